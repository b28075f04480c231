"""The benchmarks of one file each; `python -m bench NAME` runs it."""
