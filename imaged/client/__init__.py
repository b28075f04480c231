"""The SDK: calls (what is sent and what answers mean), events (a job's stream), client (sync),
aio (async).
"""
