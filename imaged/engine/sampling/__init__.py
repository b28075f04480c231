"""A sampler's coefficients (tables), computed by its solver from a noise schedule (solvers)."""
