"""One process for one device: main (start), loop (claim, tick, deliver), residence (which
checkpoints lie there), pulse (lease and progress), parking (states of jobs under way), check (the
operator's look at a picture), deliver (pixels to files to the row), encode (pixels to a file's
bytes), supervisor (keeps the processes alive), threads (how theirs wait for each other).
"""
