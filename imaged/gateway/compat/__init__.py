"""Other vendors' routes on the same jobs: OpenAI (openai), A1111 (a1111), the account routes of
Segmind's clients (segmind).
"""
