"""Jobs: queue and transitions, drafts, progress, idempotency keys, history; what models are asked
for (model_demand, workload) and which kill workers (load_failures).
"""
