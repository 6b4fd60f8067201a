"""Kernels for NVIDIA GPUs, in Triton; products of full-precision weights are cuBLAS's."""
