"""Profiles some steps: a trace for Perfetto, and a snapshot of the memory.

In attempts/<n>/profile, for the steps after step 100 up to step 103:

00000100-00000103.trace.json.gz    open it at https://ui.perfetto.dev
00000100-00000103.memory.pickle    CUDA: every allocation, for https://pytorch.org/memory_viz
00000100-00000103.memory.txt       CPU, for which torch has no such snapshot: bytes by operator
"""

import logging
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_ALLOCATIONS = 1_000_000  # the newest that a memory snapshot keeps

log = logging.getLogger(__name__)


class Profiler:
    """Profiles ``steps``, counted from 0, into ``folder``; without a folder it does nothing. Use as a context manager.

    An attempt that starts or ends among the steps profiles those that it takes.
    """

    def __init__(self, steps: range, folder: Path | None, device: torch.device):
        self._steps, self._folder, self._device = steps, folder, device
        self._profiler: profile | None = None
        self._first = self._done = 0

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *exc) -> None:
        self._finish()

    @contextmanager
    def step(self, step: int) -> Generator[None]:
        """Around each step of the attempt."""
        if self._folder is None or step not in self._steps:
            yield
            return
        if self._profiler is None:
            self._start(step)
        with record_function(f"step {step + 1}"):
            yield
        self._done = step + 1
        if self._done == self._steps.stop:
            self._finish()

    def _start(self, step: int) -> None:
        activities = [ProfilerActivity.CPU]
        if self._on_cuda:
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_ALLOCATIONS)
        self._first = self._done = step
        self._profiler = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._profiler.start()

    def _finish(self) -> None:
        if self._profiler is None or self._folder is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        try:
            self._write(profiler, self._folder)
        except OSError as error:  # a full disk: no reason to end a run
            log.warning("the profile of the steps after %d could not be written: %s", self._first, error)

    def _write(self, profiler: profile, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = str(folder / f"{self._first:08d}-{self._done:08d}")
        profiler.export_chrome_trace(f"{name}.trace.json.gz")
        if self._on_cuda:
            torch.cuda.memory._dump_snapshot(f"{name}.memory.pickle")
            torch.cuda.memory._record_memory_history(enabled=None)
        else:
            averages = profiler.key_averages(group_by_input_shape=True)
            table = averages.table(sort_by="self_cpu_memory_usage", row_limit=100, max_name_column_width=60)
            Path(f"{name}.memory.txt").write_text(table)

    @property
    def _on_cuda(self) -> bool:
        return self._device.type == "cuda"
