"""The parts of the training, a file each (train.py says in which order), and what they share."""
