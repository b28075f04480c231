"""The micro checkpoint: scenes (the data), train and parts (the weights), evaluate and judge (the
figures), sheets (pictures for the documents).
"""
