"""CUDA graphs: the kernel launches of a call are recorded once per shape, then replayed as one.

A recording reads and writes memory of its own, so inputs are copied in and the output out. On other
devices the function is called on that memory instead: tests on a CPU see no more than that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from cachetools import LRUCache

Call = Callable[..., torch.Tensor]

CACHED_SHAPES = 32  # they share one pool and equal inputs, for only one is replayed at a time
WARM_CALLS = 3  # before a recording, on a stream of their own, as PyTorch's documentation asks


@dataclass(frozen=True)
class _Recording:
    inputs: tuple[torch.Tensor, ...]
    replay: Callable[[], torch.Tensor]  # its output is overwritten by the next replay


class Graphs:
    """Calls `function` on tensors; it must launch the same kernels for all inputs of one shape."""

    def __init__(self, function: Call) -> None:
        self._function = function
        self._recordings: LRUCache[tuple[torch.Size, ...], _Recording] = LRUCache(CACHED_SHAPES)
        self._memory: WeakValueDictionary[tuple[int, torch.Size], torch.Tensor]
        self._memory = WeakValueDictionary()  # inputs by place and shape
        self._pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        shapes = tuple(part.shape for part in inputs)
        if (recording := self._recordings.get(shapes)) is None:
            recording = self._recordings[shapes] = self._record(inputs)
        for memory, part in zip(recording.inputs, inputs, strict=True):
            memory.copy_(part)
        return recording.replay().clone()

    def clear(self) -> None:
        """Drop the recordings: the function does something else from now on."""
        self._recordings.clear()

    def _own(self, place: int, part: torch.Tensor) -> torch.Tensor:
        """The memory of one input, shared by all recordings with its shape: the texts of a large
        batch take hundreds of megabytes.
        """
        own = self._memory.get((place, part.shape))
        if own is None:
            own = part.clone(memory_format=torch.contiguous_format)
            self._memory[place, part.shape] = own
        return own.copy_(part)

    def _record(self, inputs: tuple[torch.Tensor, ...]) -> _Recording:
        memory = tuple(self._own(n, part) for n, part in enumerate(inputs))
        if memory[0].device.type != "cuda":
            return _Recording(memory, lambda: self._function(*memory))
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_CALLS):
                self._function(*memory)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Another thread may decode meanwhile: its allocations are no part of the recording.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = self._function(*memory)

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return _Recording(memory, replay)
