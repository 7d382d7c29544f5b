"""Property tests that run on any quantizer."""
