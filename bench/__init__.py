"""Measurements against what else there is, each one command: `python -m bench --help`.

`sides` has what is measured, checkpoints and peers included. The benchmarks are in `runs`, one a
file, and where they have several in a folder of their own: `full`, `gpu`. Here is what they share:
app (options), rounds (in which order, and what a difference is), ceiling (what the machine can do),
figures (what is written down), code (of which code it is), report (the document).
"""
