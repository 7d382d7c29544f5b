"""Adapters for third-party solvers, one file each; a vendor's package is imported when its adapter is called."""
