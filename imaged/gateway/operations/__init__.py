"""What operators ask: liveness, readiness, metrics; and the maintenance that runs beside."""
