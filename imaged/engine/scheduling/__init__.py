"""Which pictures share the next UNet call: fair queueing (batching), how many rows it may have
(call_budget), the batch sizes that keep bits (row_buckets), what a call takes (cost_model), and
what calls took (device_time).
"""
