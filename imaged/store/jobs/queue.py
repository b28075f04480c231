"""The queue in a table: the gateway puts, reads and cancels jobs; a worker registers, claims,
beats, finishes, fails, gives back and ends its lease; maintenance reaps and deletes.

State and money of a job change in one transaction. Every write of a worker carries the epoch of its
claim (a fencing token): if the job was claimed again since, the write does nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

import sqlalchemy as sa

from imaged.errors import Refused
from imaged.jobs import Draft, Job, JobReport, State, Submission, new_job_id
from imaged.params.image_params import ImageParams
from imaged.store.accounts import rate_limits
from imaged.store.jobs import drafts, idempotency, load_failures
from imaged.store.jobs.progress import delete, drop_previews, note
from imaged.store.jobs.transitions import (
    QUEUED,
    WAITING_SINCE,
    charge,
    end,
    past_cancel_deadline,
    requeue,
    running,
    still_held,
)
from imaged.store.sql.schema import api_keys, jobs, progress, workers
from imaged.store.webhooks import outbox

_JOB = sa.select(jobs, progress.c.calls_done, progress.c.preview_call).join_from(
    jobs, progress, progress.c.job_id == jobs.c.id, isouter=True
)  # without previews: most reads are polls
_FIELDS = frozenset(Job.__dataclass_fields__)


# -- the gateway's side ---------------------------------------------------------------------


@dataclass(frozen=True)
class Placement:
    """What `put` did: the job of a request, new or of an earlier one.

    rate:     what its key may still submit.
    repeated: an earlier request with the same Idempotency-Key made the job.
    """

    job_id: str
    rate: rate_limits.RateLimit
    repeated: bool


def put(
    connection: sa.Connection,
    submission: Submission,
    now: float,
    problem: Refused | None = None,
) -> Placement:
    """Insert a job and reserve its price; raises `problem`, TooFast or NoCredits.

    With an Idempotency-Key that was used before: returns that job, or raises IdempotencyMismatch.
    problem: why the request cannot become a job, found before; it does not concern a repeat.

    Start-time fair queueing between keys: each key has a virtual clock that the price of its jobs
    advances (a dollar by a thousand seconds) and that never lags behind the wall clock.
    """
    key = connection.execute(
        sa.select(api_keys).where(api_keys.c.id == submission.key_id).with_for_update()
    ).one()
    if submission.idempotency_key is not None:
        first = idempotency.find(connection, submission, now)
        if first is not None:
            return Placement(first, rate_limits.rate_limit(key, now), repeated=True)
    if problem is not None:
        raise problem
    job_id, cost = new_job_id(), submission.cost_micros
    tag, rate = rate_limits.take_and_reserve(connection, key, job_id, cost, now)
    row = jobs.insert().values(id=job_id, tag=tag, created_at=now, **_row(submission, now))
    connection.execute(row)
    return Placement(job_id, rate, repeated=False)


def _row(submission: Submission, now: float) -> dict[str, Any]:
    """What a job's row takes from its request."""
    draft, cancel_s = submission.draft_steps, submission.cancel_after_s
    return {
        "key_id": submission.key_id,
        "model": submission.model.slug,
        "params": submission.params.as_dict(),
        "state": State.QUEUED,
        "epoch": 0,
        "attempts": 0,
        "cost_micros": submission.cost_micros,
        "idempotency_key": submission.idempotency_key,
        "fingerprint": submission.fingerprint,
        "cancel_at": cancel_s and now + cancel_s,
        "draft": asdict(Draft(draft)) if draft else sa.null(),
        "made_in": submission.made_in,
    }


def read(connection: sa.Connection, ids: Collection[str]) -> dict[str, Job]:
    """Those of these jobs that exist, by id."""
    rows = connection.execute(_JOB.where(jobs.c.id.in_(list(ids))))
    return {row.id: _job(row) for row in rows}


def newest(connection: sa.Connection, limit: int = 50) -> list[Job]:
    rows = connection.execute(_JOB.order_by(jobs.c.created_at.desc()).limit(limit))
    return [_job(row) for row in rows]


def open_of(connection: sa.Connection, key_id: int) -> list[str]:
    """Ids of the key's queued and running jobs, oldest first."""
    still = jobs.c.state.in_((State.QUEUED, State.PROCESSING))
    found = sa.select(jobs.c.id).where(jobs.c.key_id == key_id, still)
    return list(connection.execute(found.order_by(jobs.c.created_at)).scalars())


def cancel(connection: sa.Connection, job_id: str, now: float, retention_s: float) -> bool:
    """Cancel a job that has not ended; its worker learns by heartbeat. A shown draft is charged."""
    which, error = [jobs.c.id == job_id], "the job was cancelled"
    return end(connection, which, State.CANCELLED, "cancelled", error, now, retention_s) > 0


def refuse(
    connection: sa.Connection, job_id: str, reason: str, error: str, now: float, retention_s: float
) -> None:
    """Fail a job in the transaction that put it, so that it is never claimed."""
    end(connection, [jobs.c.id == job_id], State.FAILED, reason, error, now, retention_s)


# -- the worker's side ----------------------------------------------------------------------


def register(connection: sa.Connection, worker_id: str, pid: int, host: str, now: float) -> None:
    connection.execute(
        workers.insert().values(
            id=worker_id, pid=pid, host=host, started_at=now, seen_at=now, ticked_at=now
        )
    )


def claim(
    connection: sa.Connection,
    worker_id: str,
    models: Collection[str],
    limit: int,
    now: float,
    *,
    alone: bool = True,
    most_work: float = math.inf,
) -> list[Job]:
    """QUEUED -> PROCESSING for up to `limit` jobs of these models, in fair order. A worker without
    a lease gets none.

    A job that was running when a worker crashed is claimed by itself, and only by a worker that is
    `alone`, without other jobs: if it crashes workers, it takes no other job with it.
    most_work: of jobs that cost at most so much, in micro-dollars; none if the first costs more.
    """
    leased = sa.exists().where(workers.c.id == worker_id)
    waiting = (
        sa.select(jobs.c.id, jobs.c.attempts, jobs.c.cost_micros)
        .where(QUEUED, jobs.c.model.in_(list(models)), leased, ~past_cancel_deadline(now))
        .order_by(jobs.c.tag)
    )
    fairest = connection.execute(waiting.limit(1)).first()
    if fairest is None or fairest.cost_micros > most_work or (fairest.attempts and not alone):
        return []
    if fairest.attempts:
        waiting, limit = waiting.where(jobs.c.id == fairest.id), 1
    else:
        waiting = waiting.where(jobs.c.attempts == 0)
    waiting = waiting.where(jobs.c.cost_micros <= most_work) if most_work < math.inf else waiting
    picked = waiting.limit(limit).with_for_update(skip_locked=True).cte("picked")
    taken = connection.execute(
        jobs.update()
        .where(jobs.c.id.in_(sa.select(picked.c.id)), QUEUED)
        .values(
            state=State.PROCESSING,
            worker_id=worker_id,
            epoch=jobs.c.epoch + 1,
            attempts=jobs.c.attempts + 1,
            started_at=now,
        )
        .returning(jobs)
    ).all()
    return sorted((_job(row) for row in taken), key=lambda job: job.created_at)


def beat(
    connection: sa.Connection,
    worker_id: str,
    now: float,
    ticked_at: float,
    checkpoint: str | None,
    held: Mapping[str, JobReport],
    models: Mapping[str, str] = MappingProxyType({}),
) -> set[str] | None:
    """Heartbeat: renew the lease, store the models' states and the progress of held jobs.

    Returns the held jobs that were cancelled, timed out or reclaimed; None if the lease is gone,
    and with it all jobs.
    """
    alive = connection.execute(
        workers.update()
        .where(workers.c.id == worker_id)
        .values(seen_at=now, ticked_at=ticked_at, checkpoint=checkpoint, models=dict(models))
    ).rowcount
    if not alive:
        return None
    gone = lost(connection, worker_id, {job_id: job.epoch for job_id, job in held.items()})
    note(connection, {job_id: job for job_id, job in held.items() if job_id not in gone})
    return gone


def lost(connection: sa.Connection, worker_id: str, epochs: Mapping[str, int]) -> set[str]:
    """Those of these jobs, id -> epoch, that this worker holds no more."""
    rows = connection.execute(
        sa.select(jobs.c.id, jobs.c.epoch).where(jobs.c.id.in_(list(epochs)), running(worker_id))
    )
    return set(epochs) - {row.id for row in rows if row.epoch == epochs[row.id]}


def finish(
    connection: sa.Connection,
    job: Job,
    worker_id: str,
    result: Mapping[str, Any],
    now: float,
    retention_s: float,
) -> bool:
    """PROCESSING -> COMPLETED, and charge; False if the worker holds the job no more."""
    done = connection.execute(
        jobs.update()
        .where(still_held(job, worker_id))
        .values(
            state=State.COMPLETED,
            worker_id=None,
            result=dict(result),
            finished_at=now,
            expires_at=now + retention_s,
        )
    )
    if not done.rowcount:
        return False
    drop_previews(connection, [job.id])
    charge(connection, job.key_id, job.id, job.cost_micros, job.owed_micros, now)
    outbox.announce(connection, [job.id], now)
    return True


def fail(
    connection: sa.Connection,
    job: Job,
    worker_id: str,
    reason: str,
    error: str,
    now: float,
    retention_s: float,
) -> bool:
    """PROCESSING -> FAILED; False if the worker holds the job no more. Free, unless a draft fails
    by its caller's change, see `end`.
    """
    mine = [still_held(job, worker_id)]
    return end(connection, mine, State.FAILED, reason, error, now, retention_s) > 0


def end_lease(
    connection: sa.Connection, worker_id: str, now: float, retention_s: float, *, blame: bool
) -> int:
    """End a worker's lease and requeue its jobs.

    blame: the worker crashed: the attempt counts, and a job with MAX_ATTEMPTS fails. Without, it
    stopped in order and the attempt does not count.
    """
    connection.execute(workers.delete().where(workers.c.id == worker_id))
    if not blame:
        load_failures.end(connection, worker_id)
    return requeue(connection, running(worker_id), now, retention_s, blame=blame)


def give_back(
    connection: sa.Connection,
    job: Job,
    worker_id: str,
    now: float,
    retention_s: float,
    *,
    begun: bool,
) -> None:
    """Requeue one job; the attempt does not count."""
    mine = still_held(job, worker_id)
    requeue(connection, mine, now, retention_s, blame=False, begun=begun)


# -- maintenance ----------------------------------------------------------------------------


def reap(
    connection: sa.Connection,
    now: float,
    *,
    lease_s: float,
    queue_s: float,
    run_s: float,
    retention_s: float,
) -> int:
    """Reclaim jobs of workers without a lease, fail those that waited or ran too long, cancel
    drafts that were not finished in time; returns how many.
    """
    connection.execute(workers.delete().where(workers.c.seen_at < now - lease_s))
    orphaned = sa.and_(
        jobs.c.state == State.PROCESSING,
        ~sa.exists().where(workers.c.id == jobs.c.worker_id),
    )
    count = requeue(connection, orphaned, now, retention_s, blame=True)
    ran = [jobs.c.state == State.PROCESSING, jobs.c.started_at < now - run_s]
    waited = [QUEUED, now - queue_s > WAITING_SINCE]
    for where, reason, error in (
        (ran, "timeout", f"the job ran for more than {run_s:.0f} s"),
        (waited, "queue_timeout", f"the job waited for more than {queue_s:.0f} s"),
        (
            [QUEUED, past_cancel_deadline(now)],
            "queue_timeout",
            "the job waited for longer than its Cancel-After",
        ),
    ):
        count += end(connection, where, State.FAILED, reason, error, now, retention_s)
    return count + drafts.cancel_expired(connection, now, retention_s)


def delete_expired(connection: sa.Connection, now: float) -> list[Job]:
    """Delete ended jobs that have expired; returns them, for their files."""
    over = sa.and_(jobs.c.expires_at < now, jobs.c.state != State.PARKED)
    gone = connection.execute(jobs.delete().where(over).returning(jobs)).all()
    delete(connection, [row.id for row in gone])
    return [_job(row) for row in gone]


def _job(row: Any) -> Job:
    values = {name: value for name, value in row._mapping.items() if name in _FIELDS}
    values["state"] = State(values["state"])
    values["params"] = ImageParams(**values["params"])
    values["draft"] = values["draft"] and Draft(**values["draft"])
    for count in ("calls_done", "preview_call"):
        values[count] = values.get(count) or 0
    job = Job(**values)
    whole = job.state in (State.COMPLETED, State.PARKED)
    return replace(job, calls_done=job.unet_calls) if whole else job
