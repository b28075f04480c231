"""One process for one device: main (start), loop (claim, tick, deliver), pulse (lease and
progress), check (the operator's look at a picture), deliver (pixels to files to the row),
supervisor (keeps the processes alive).
"""
