"""Quantised checkpoints of other tools: GPTQ, AWQ and compressed-tensors read, GPTQ written."""
