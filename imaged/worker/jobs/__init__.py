"""The jobs of one worker: which it claims (claiming), those that it holds (held), and which of them
gives way to a shorter one (preemption).
"""
