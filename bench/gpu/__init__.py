"""SDXL of full size on one GPU: the command, its sections (steps, jobs) and who takes part."""
