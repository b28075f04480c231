"""Rows as answers: bodies and headers of jobs and of errors."""
