"""The parameters of a picture, defined once: name, type, default, bounds and text of each."""
