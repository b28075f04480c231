"""One process per device.

main starts it; loop claims jobs, ticks engines and hands results on; jobs has what it claims, holds
and preempts; checkpoint_cache loads and evicts checkpoints, crash_loops refuses those that crash
workers; heartbeat renews the lease and reports progress; snapshots saves jobs under way; deliver
checks (image_checker), encodes (encode) and stores results. supervisor keeps the processes alive;
openmp sets how their threads wait.
"""
