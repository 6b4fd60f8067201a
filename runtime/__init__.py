"""The engine: control plane (no torch) and data plane."""
