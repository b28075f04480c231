"""Which pictures share the next UNet call: fair queueing (batching), the batch sizes that keep bits
(row_buckets), and what a call takes (cost_model).
"""
