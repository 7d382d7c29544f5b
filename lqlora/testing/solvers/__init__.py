"""Conformance suite for solvers: properties, their inputs, and the adapter under test."""
