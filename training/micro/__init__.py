"""The micro checkpoint: scenes (the data), train (the weights), evaluate (the figures)."""
