"""Property tests that run on any backend."""
