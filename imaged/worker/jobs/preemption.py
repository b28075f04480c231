"""Which held job gives way to which waiting one, so that short jobs do not wait for long ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from imaged.store.jobs.model_demand import FirstWaiting
from imaged.worker.jobs.held import HeldJob

PREEMPT_RATIO = 4.0  # a job gives way to one of a quarter of its work
MAX_PREEMPTIONS = 3  # of one job


def choose(
    jobs: Iterable[HeldJob], waiting: Sequence[FirstWaiting]
) -> tuple[HeldJob, FirstWaiting] | None:
    """The job with the most work left, and the first waiting one with much less; None if no job
    has to give way.
    """
    begun = [held for held in jobs if _preemptible(held)]
    if not begun or not waiting:
        return None
    longest = max(begun, key=_work_left)
    most = _work_left(longest) / PREEMPT_RATIO
    return next(((longest, first) for first in waiting if first.work <= most), None)


def _preemptible(held: HeldJob) -> bool:
    """Whether a job runs, was given back under MAX_PREEMPTIONS times (by preemption, or by a worker
    that stopped), and need not run alone.
    """
    job = held.job
    return bool(held.engine) and job.attempts == 1 and job.epoch - job.attempts < MAX_PREEMPTIONS


def _work_left(held: HeldJob) -> float:
    """Work left, measured by price: micro-dollars up to the job's end or to where its draft
    rests.
    """
    made = held.engine.progress().get(held.job.id) if held.engine else None
    share = 1 - made.calls / made.total if made and made.total else 1
    return held.job.cost_of(held.job.unet_calls) * share
