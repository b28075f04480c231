"""Reading jobs: many callers' reads in one query (job_reader), waiting for a change (job_watcher),
and the time until a job would be done (forecast).
"""
