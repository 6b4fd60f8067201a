"""Request traces: reading, describing, cutting, making."""
