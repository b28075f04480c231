"""Everything that outlives a process: plain functions on a connection that the caller opened.

sql/ (connections, schema, migrations, group commit), accounts/ (keys, ledger, rate limits), jobs/
(the queue and what belongs to a job), webhooks/ (subscriptions, outbox), catalogue (models), blobs
(image files and snapshots), signing.
"""
