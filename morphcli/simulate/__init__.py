"""The control plane of a server on a simulated device: hours of traffic in seconds."""
