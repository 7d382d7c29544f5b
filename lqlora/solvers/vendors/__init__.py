"""Adapters of third-party solvers, one file each. A vendor's package is imported when its adapter is called."""
