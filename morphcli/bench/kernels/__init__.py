"""`morph bench --kernels`: what this machine can do, and how much of it the kernels reach."""
