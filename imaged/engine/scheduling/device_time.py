"""Seconds of the device: what calls took, what the next would take, and which keys used them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from imaged.engine.scheduling.batching import Candidate, joined
from imaged.engine.scheduling.cost_model import CostModel

W = TypeVar("W", bound=Candidate)


class Clock:
    """Time stamps on the device. ahead: calls that may still run or queue there when the next batch
    is chosen: one on a GPU, which runs behind the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self.ahead = 1 if self._gpu else 0

    def mark(self) -> Any:
        if not self._gpu:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, began: Any, ended: Any) -> float:
        """Between two marks; waits until the device has reached the second."""
        if not self._gpu:
            return float(ended - began)
        ended.synchronize()
        return float(began.elapsed_time(ended)) / 1000


class _Call(NamedTuple, Generic[W]):
    """A call queued on the device: rows of each image, rows times pixels of all, two marks."""

    images: Sequence[W]
    rows: Sequence[int]
    work: int
    began: Any
    ended: Any


class DeviceTime(Generic[W]):
    """Measures calls. Feeds the cost model, and charges each call to its images' keys by rows.

    used_s: seconds of the device by key, see batching.joined.
    """

    def __init__(self, device: torch.device) -> None:
        self.clock, self.cost_model = Clock(device), CostModel()
        self.used_s: dict[int, float] = {}
        self._under_way: deque[_Call[W]] = deque()

    def add(self, images: Sequence[W], work: int, began: Any) -> None:
        """A call has been queued, after the mark `began`; work: rows times pixels, padded."""
        rows = [image.rows for image in images]
        self._under_way.append(_Call(images, rows, work, began, self.clock.mark()))

    def ended(self, *, more: bool) -> list[tuple[W, float]]:
        """The images of calls that have ended, each with the seconds of its call.

        more: calls follow, so those `ahead` may still wait on the device; else it waits for all.
        """
        found = []
        while len(self._under_way) > (self.clock.ahead if more else 0):
            call = self._under_way.popleft()
            seconds = self.clock.seconds(call.began, call.ended)
            self.cost_model.add(call.work, seconds)
            for image, own in zip(call.images, call.rows, strict=True):
                share = seconds * own / sum(call.rows)
                self.used_s[image.key_id] = self.used_s.get(image.key_id, 0.0) + share
                found.append((image, seconds))
        return found

    def join(self, present: Collection[int], key_id: int) -> None:
        """A key has a job more, beside the keys present."""
        self.used_s = joined(self.used_s, present, key_id)
