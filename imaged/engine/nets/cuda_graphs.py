"""CUDA graphs: the launches of a call recorded once for each shape, and replayed as one.

A recording reads and writes memory of its own, so inputs are copied in and the output out. On other
devices the function itself is called on the same memory, which is all that tests on a CPU can see.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch

Call = Callable[..., torch.Tensor]

KEPT_SHAPES = 32  # they share one pool and equal inputs, for only one is replayed at a time
WARM_CALLS = 3  # before a recording, on a stream of their own, as PyTorch's documentation asks


@dataclass(frozen=True)
class _Recording:
    inputs: tuple[torch.Tensor, ...]
    replay: Callable[[], torch.Tensor]  # its output is overwritten by the next replay


class Graphs:
    """Calls `function` on tensors, which must do the same for every input of one shape."""

    def __init__(self, function: Call) -> None:
        self._function = function
        self._recordings: OrderedDict[tuple[torch.Size, ...], _Recording] = OrderedDict()
        self._memory: WeakValueDictionary[tuple[int, torch.Size], torch.Tensor]
        self._memory = WeakValueDictionary()  # inputs by place and shape
        self._pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        key = tuple(part.shape for part in inputs)
        if key not in self._recordings:
            self._recordings[key] = self._record(inputs)
            if len(self._recordings) > KEPT_SHAPES:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(key)
        recording = self._recordings[key]
        for memory, part in zip(recording.inputs, inputs, strict=True):
            memory.copy_(part)
        return recording.replay().clone()

    def forget(self) -> None:
        """The function does something else from now on."""
        self._recordings.clear()

    def _own(self, place: int, part: torch.Tensor) -> torch.Tensor:
        """Memory for one input: the text's alone is hundreds of megabytes in a large batch."""
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
