"""Where a sampler steps (noise_schedule) and what it is called (schedulers); no tensors."""
