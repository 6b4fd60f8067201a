"""From checkpoint to bundle; knows nothing of serving."""
