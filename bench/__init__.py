"""Measurements against what else there is, each one command: `python -m bench --help`.

Files in the order of a measurement: models (checkpoints of random weights), servers and peer*
(who is measured), rounds (in which order, and what a difference is), ceiling (what the machine
can do), one file for each benchmark, figures (what is written down), report (the document).
"""
