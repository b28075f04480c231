"""From a request to a queued job: the Submission that every dialect makes (submission), promised
price (quotes), and one transaction (admission). cpu_share limits unbilled CPU time per key.
"""
