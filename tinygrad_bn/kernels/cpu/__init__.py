"""Kernels for NumPy arrays: chunks that stay in cache, on as many threads as there are CPUs."""
