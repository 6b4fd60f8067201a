"""`morph top`: a running server, live in a terminal."""
