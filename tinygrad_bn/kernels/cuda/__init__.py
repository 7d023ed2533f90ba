"""Fused kernels for raw CuPy arrays: `.cu` files, and a thin module of Python around each."""
