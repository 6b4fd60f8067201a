"""The HTTP process: OpenAI-compatible API in front of the engine process."""
