"""The data: what a scene is, how it is painted, and the words for it."""
