"""All that outlives a process; plain functions on a connection that the caller opened.

db (connections), schema and migrations, writer (group commit), keys, ledger, limits (rate,
fair order), queue, demand (which models are asked for, and where they lie), repeats
(Idempotency-Key), webhooks and their outbox, models, blobs (pictures).
"""
