"""Calibration statistics of linear layers: Fisher information, Gram matrices and Kronecker factors."""
