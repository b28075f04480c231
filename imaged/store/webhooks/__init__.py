"""Webhooks of a key (subscriptions) and the events that they are to be told (outbox)."""
