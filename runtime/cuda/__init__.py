"""Serving on an NVIDIA GPU: streams, CUDA graphs, and tokens that are read one step late."""
