"""How the shipped weights were made; nothing here is needed to run the server."""
