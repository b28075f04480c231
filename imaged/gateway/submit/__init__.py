"""From a request to a queued job: its body (request_body, draft_option), headers (options),
promised price (quotes), and one transaction (admission). cpu_share limits unbilled CPU time per
key.
"""
