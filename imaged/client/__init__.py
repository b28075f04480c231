"""The SDK: calls (what is sent and what answers mean), client (sync), aio (async)."""
