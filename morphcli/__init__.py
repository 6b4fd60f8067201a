"""What a person meets: the `morph` command."""
