"""Which prompts are refused: the operator's rules, the class that is always refused (minors), which
texts of a request they judge (texts), and in which spellings (normalize).
"""
