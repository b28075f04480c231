"""The queue is a table: put, claim, beat, finish, fail, release, cancel, reap, expire.

A job's moves and its money change in one transaction. Every write of a worker names the epoch
it claimed; when the job has moved on since, the write does nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

import sqlalchemy as sa

from imaged.jobs import NO_TERMS, Draft, Held, Job, State, Terms
from imaged.params import ImageParams
from imaged.store import drafts, limits, loads, outbox, repeats
from imaged.store.moves import QUEUED, charge, end, in_vain, requeue, running
from imaged.store.progress import drop_previews, forget, note
from imaged.store.schema import api_keys, jobs, progress, workers

_JOB = sa.select(jobs, progress.c.calls_done, progress.c.preview_call).join_from(
    jobs, progress, progress.c.job_id == jobs.c.id, isouter=True
)  # without the preview itself: polls are the load, and few want it
_FIELDS = frozenset(Job.__dataclass_fields__)


# -- the gateway's side ---------------------------------------------------------------------


@dataclass(frozen=True)
class Placed:
    """The job that stands for a request, and what its key may still submit."""

    job_id: str
    share: limits.Share


def put(
    connection: sa.Connection,
    *,
    job_id: str,
    key_id: int,
    model: str,
    params: ImageParams,
    cost_micros: int,
    now: float,
    terms: Terms = NO_TERMS,
) -> Placed:
    """Take a place in the queue and hold its price, or raise TooFast or NoCredits.

    Under an Idempotency-Key that was used before nothing happens and the place is the first
    job's (or IdempotencyMismatch is raised).

    The place is fair between keys: each key has a clock that its jobs' cost moves on, never
    behind the wall clock (start-time fair queueing; a dollar counts as a thousand seconds).
    """
    key = connection.execute(
        sa.select(api_keys).where(api_keys.c.id == key_id).with_for_update()
    ).one()
    if (first := repeats.find(connection, key_id, terms, now)) is not None:
        return Placed(first, limits.share(key, now))
    tag, share = limits.hold(connection, key, job_id, cost_micros, now)
    connection.execute(
        jobs.insert().values(
            id=job_id,
            key_id=key_id,
            model=model,
            params=params.as_dict(),
            state=State.QUEUED,
            tag=tag,
            epoch=0,
            attempts=0,
            cost_micros=cost_micros,
            created_at=now,
            idempotency_key=terms.idempotency_key,
            fingerprint=terms.fingerprint,
            cancel_at=terms.cancel_after_s and now + terms.cancel_after_s,
            draft=asdict(Draft(terms.draft_steps)) if terms.draft_steps else sa.null(),
            made_in=terms.made_in,
        )
    )
    return Placed(job_id, share)


def read(connection: sa.Connection, ids: Collection[str]) -> dict[str, Job]:
    """The jobs of these ids that exist."""
    rows = connection.execute(_JOB.where(jobs.c.id.in_(list(ids))))
    return {row.id: _job(row) for row in rows}


def newest(connection: sa.Connection, limit: int = 50) -> list[Job]:
    rows = connection.execute(_JOB.order_by(jobs.c.created_at.desc()).limit(limit))
    return [_job(row) for row in rows]


def open_of(connection: sa.Connection, key_id: int) -> list[str]:
    """The key's jobs that wait or run, the oldest first."""
    still = jobs.c.state.in_((State.QUEUED, State.PROCESSING))
    found = sa.select(jobs.c.id).where(jobs.c.key_id == key_id, still)
    return list(connection.execute(found.order_by(jobs.c.created_at)).scalars())


def cancel(connection: sa.Connection, job_id: str, now: float, retention_s: float) -> bool:
    """End a job that has not ended, give its money back; its worker hears of it by heartbeat."""
    return (
        end(
            connection,
            [jobs.c.id == job_id],
            State.CANCELLED,
            "cancelled",
            "the job was cancelled",
            now,
            retention_s,
        )
        > 0
    )


def refuse(
    connection: sa.Connection, job_id: str, reason: str, error: str, now: float, retention_s: float
) -> None:
    """End a job that was put a moment ago, in the same transaction: it never waits."""
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
    """Take up to `limit` waiting jobs of these models in this worker's name, fairest first.

    Without a lease there is nothing to take. A job that was there when a worker died is taken by
    itself and only by a worker that is `alone`, with no other job in hand: if it is what kills
    workers, it takes nobody with it. `most_work`, in micro-dollars: the fairest is left if it costs
    more.
    """
    leased = sa.exists().where(workers.c.id == worker_id)
    waiting = (
        sa.select(jobs.c.id, jobs.c.attempts, jobs.c.cost_micros)
        .where(QUEUED, jobs.c.model.in_(list(models)), leased, ~in_vain(now))
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
    held: Mapping[str, Held],
    models: Mapping[str, str] = MappingProxyType({}),
) -> set[str] | None:
    """Renew the lease and note the models' states here, and progress and previews of held jobs.

    Returns the held jobs that are this worker's no more (cancelled, timed out or reclaimed),
    or None if the lease itself is gone and everything with it.
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
    """Those of the jobs, id -> epoch, that are this worker's no more."""
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
    """COMPLETED and charged, if the worker still holds this epoch; False if it does not."""
    done = connection.execute(
        jobs.update()
        .where(jobs.c.id == job.id, jobs.c.epoch == job.epoch, running(worker_id))
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
    """FAILED and not charged, if the worker still holds this epoch."""
    where = [jobs.c.id == job.id, jobs.c.epoch == job.epoch, running(worker_id)]
    return end(connection, where, State.FAILED, reason, error, now, retention_s) > 0


def release(
    connection: sa.Connection, worker_id: str, now: float, retention_s: float, *, blame: bool
) -> int:
    """A worker has stopped: its jobs wait again, and its lease is gone.

    With `blame` it died, and a job that has been through MAX_ATTEMPTS such deaths fails;
    without, it gave the jobs back in order and the attempt does not count.
    """
    connection.execute(workers.delete().where(workers.c.id == worker_id))
    if not blame:
        loads.end(connection, worker_id)
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
    """A job waits again; the attempt does not count."""
    mine = sa.and_(jobs.c.id == job.id, jobs.c.epoch == job.epoch, running(worker_id))
    requeue(connection, mine, now, retention_s, blame=False, begun=begun)


# -- anybody's: what time does to jobs ------------------------------------------------------


def reap(
    connection: sa.Connection,
    now: float,
    *,
    lease_s: float,
    queue_s: float,
    run_s: float,
    retention_s: float,
) -> int:
    """Reclaim the jobs of silent workers; fail what waited or ran too long. Returns how many."""
    connection.execute(workers.delete().where(workers.c.seen_at < now - lease_s))
    orphaned = sa.and_(
        jobs.c.state == State.PROCESSING,
        ~sa.exists().where(workers.c.id == jobs.c.worker_id),
    )
    count = requeue(connection, orphaned, now, retention_s, blame=True)
    count += end(
        connection,
        [jobs.c.state == State.PROCESSING, jobs.c.started_at < now - run_s],
        State.FAILED,
        "timeout",
        f"the job ran for more than {run_s:.0f} s",
        now,
        retention_s,
    )
    count += end(
        connection,
        [QUEUED, sa.func.coalesce(jobs.c.started_at, jobs.c.created_at) < now - queue_s],
        State.FAILED,
        "queue_timeout",
        f"the job waited for more than {queue_s:.0f} s",
        now,
        retention_s,
    )
    count += end(
        connection,
        [QUEUED, in_vain(now)],
        State.FAILED,
        "queue_timeout",
        "the job waited for longer than its Cancel-After",
        now,
        retention_s,
    )
    return count + drafts.forget(connection, now, retention_s)


def expire(connection: sa.Connection, now: float) -> list[Job]:
    """Forget ended jobs past their time; returns them, so that their pictures go as well."""
    over = sa.and_(jobs.c.expires_at < now, jobs.c.state != State.PARKED)
    gone = connection.execute(jobs.delete().where(over).returning(jobs)).all()
    forget(connection, [row.id for row in gone])
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
