"""Text to context: grammar (weights), tokens (75-token windows), encode (both text encoders)."""
