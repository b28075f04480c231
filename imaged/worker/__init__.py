"""One process for one device: main (start), loop (claim, tick, deliver), residence (which
checkpoints lie there), pulse (lease and progress), check (the operator's look at a picture),
deliver (pixels to files to the row), supervisor (keeps the processes alive).
"""
