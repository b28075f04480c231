"""The whole way once: a server, the vendor's SDK, a picture."""
