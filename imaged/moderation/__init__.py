"""Which prompts are refused: the operator's rules, and the texts of a request that they judge
(rules), the class that is always refused (minors), and in which spellings (normalize).
"""
