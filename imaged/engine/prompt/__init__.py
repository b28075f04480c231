"""Text to UNet context: encode (both text encoders), embeddings (textual inversion), compel."""
