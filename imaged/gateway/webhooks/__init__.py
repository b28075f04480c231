"""Delivery of events to webhooks (delivery), and which addresses they may have (url_guard)."""
