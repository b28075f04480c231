"""What is measured: checkpoints of random weights, our servers and the peers', the rules of who
goes when, and whether both sides made the same picture. All of it counts for every benchmark.
"""
