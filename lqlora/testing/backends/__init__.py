"""Conformance suite for backends."""
