"""Which prompts are refused: the operator's rules, the class that is always refused (minors), and
the spellings of a text that both judge (normalize).
"""
