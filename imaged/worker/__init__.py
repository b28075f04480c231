"""One process for one device: main (start), loop (claim, tick, deliver), pulse (lease and
progress), deliver (pixels to files to the row), supervisor (keeps the processes alive).
"""
