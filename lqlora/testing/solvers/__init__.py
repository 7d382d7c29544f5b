"""Property tests that run on any solver."""
