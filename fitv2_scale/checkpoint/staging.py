"""A copy of a rank's state in host memory, as it was at one moment, made while training continues.

Forward and backward passes only read the state, so they may overlap with the copy; the optimizer must wait for it. On
CUDA the copy runs on its own stream into pinned memory, and the optimizer's stream waits, not the host.
"""

import threading
import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from fitv2_scale.parallel.boxes import Box, LogicalTensor


class Staging:
    """One buffer of the size of this rank's boxes, allocated and touched when this is made, and reused for every save.

    ``tensors`` are the boxes of the copy. A copy takes three calls: ``mark`` at the moment to be saved, ``copy``,
    perhaps in another thread, and ``wait`` before the state changes.
    """

    def __init__(self, live: Mapping[str, LogicalTensor]) -> None:
        boxes = _tensors(live)
        self._buffer = torch.zeros(sum(t.numel() for t in boxes))  # touched: a copy must not wait for pages
        parts = iter(self._buffer.split([t.numel() for t in boxes]))
        self.tensors = {
            name: replace(t, boxes=[Box(b.offset, next(parts).view(b.tensor.shape)) for b in t.boxes])
            for name, t in live.items()
        }
        self._host, self._live = _tensors(self.tensors), boxes
        self._begun = threading.Event()
        self._begun.set()
        self._stream = self._copied = None
        device = next((t.device for t in boxes), self._buffer.device)
        if device.type == "cuda":
            _pin(self._buffer)
            weakref.finalize(self, _unpin, self._buffer, device)
            self._stream = torch.cuda.Stream(device)
            self._copied = torch.cuda.Event(blocking=True)  # sleeps: others need the core

    @property
    def bytes(self) -> int:
        return self._buffer.nbytes

    def mark(self, live: Mapping[str, LogicalTensor]) -> None:
        """The next ``copy`` copies ``live`` as it is now; its layout must be that of the first."""
        self._live = _tensors(live)
        assert [t.shape for t in self._live] == [t.shape for t in self._host], "the state has another layout now"
        self._begun.clear()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def copy(self) -> None:
        """Copies the marked state. Returns when the values are in host memory."""
        try:
            with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext(), torch.no_grad():
                if self._host:
                    torch._foreach_copy_(self._host, self._live, non_blocking=True)  # one call: the GIL is free
                if self._copied is not None:
                    self._copied.record()
        finally:
            self._begun.set()  # whatever happened: `wait` must not wait forever
        if self._copied is not None:
            self._copied.synchronize()

    def wait(self) -> None:
        """When this returns, the state may change. On CUDA only the current stream waits for the copy, not the host."""
        self._begun.wait()
        if self._stream is not None and self._copied is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._copied)


def _tensors(state: Mapping[str, LogicalTensor]) -> list[Tensor]:
    return [box.tensor for logical in state.values() for box in logical.boxes]


def _pin(buffer: Tensor) -> None:
    """In place: torch allocates pinned memory in powers of two, which may be almost twice as much."""
    if buffer.nbytes:
        torch.cuda.check_error(int(_cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)))


def _unpin(buffer: Tensor, device: torch.device) -> None:
    """``device`` is the rank's: this may be called in any thread, whose current device is GPU 0."""
    if buffer.nbytes:
        with torch.cuda.device(device):
            _cudart().cudaHostUnregister(buffer.data_ptr())


def _cudart():
    runtime = torch.cuda.cudart()  # initializes CUDA first
    assert runtime is not None
    return runtime
