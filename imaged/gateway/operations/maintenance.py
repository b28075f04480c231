"""Periodic maintenance: reclaim lost jobs, end overdue ones, delete expired ones and their
files.
"""

from __future__ import annotations

import asyncio
import logging
import time

from imaged.gateway.context import Gateway
from imaged.store.jobs import history, queue

log = logging.getLogger(__name__)


CHORES_S = 2.0


async def chores(gateway: Gateway) -> None:
    """Run maintenance every CHORES_S seconds until cancelled."""
    swept = False
    while True:
        await asyncio.sleep(CHORES_S)
        try:
            await asyncio.to_thread(_chores_once, gateway)
            if not swept:
                await asyncio.to_thread(_sweep, gateway)
                swept = True
        except Exception:  # this loop must not end
            log.exception("chores failed; trying again")


def _chores_once(gateway: Gateway) -> None:
    s = gateway.settings
    now = time.time()  # before the write lock: workers that wait for it too are not silent
    with gateway.db.write() as connection:
        queue.reap(
            connection,
            now,
            lease_s=s.lease_s,
            queue_s=s.queue_s,
            run_s=s.run_s,
            retention_s=s.retention_s,
        )
        if s.history_s > 0:
            history.keep(connection, now)
        history.delete_older(connection, now - s.history_s)
        gone = queue.delete_expired(connection, now)
    for job in gone:  # after the commit: no row may point to a missing file
        try:
            gateway.blobs.delete_of(job.id)
        except OSError:
            log.exception("the pictures of %s stay behind", job.id)


def _sweep(gateway: Gateway) -> None:
    """Delete files without a row: the process had died between the two deletions."""
    old = gateway.blobs.job_ids(older_than=time.time() - gateway.settings.retention_s)
    for job_id in old:
        with gateway.db.read() as connection:
            known = queue.read(connection, [job_id])
        if not known:
            gateway.blobs.delete_of(job_id)
