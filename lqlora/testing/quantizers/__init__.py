"""Conformance suite for quantizers: properties, their inputs, and the quantizer under test."""
