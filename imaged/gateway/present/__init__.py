"""Rendering: jobs and errors as bodies and headers."""
