"""Measures what must not grow with the dataset or the length of a run: the cursor, the time to resume, and memory.

Time and memory are those of new processes. Memory is given twice: its peak, including the pages of the mapped manifest
that the process has read, which belong to the page cache and can be reclaimed; and without them (RssAnon), the memory
that the process needs in any case.
"""

import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_sharding.format.manifest import Manifest
from data_sharding.plan.pack_shapes import shapes_for_plan
from data_sharding.plan.plan import Cursor, Plan, Segment
from data_sharding.plan.size_presets import IMAGENET_IMAGES, open_preset
from data_sharding.stream.loader import Loader
from fitv2_scale.bench.synthetic import write_columns
from fitv2_scale.bench.workload import BATCH, COST, PACK_TOKENS, plan_of

LATE = 1_999_000
_HUGE = 100_000_000
_NODES = (8,)
_FAR_APART = (0, 123_456, 400_000, 800_000, 1_200_000, 1_600_000, LATE)
_READABLE = 4096  # images of the dataset that is actually read, about 100 MB
_PAUSE = 0.002  # seconds between two measurements of memory


def measure(huge: bool = False) -> dict[str, Any]:
    """All figures; with ``huge`` also those of 100 M images, which take 2 GB of disk in the temporary folder and a
    minute."""
    return {
        "cursor": cursor(),
        "resuming": resuming(),
        "memory": [memory(images) for images in (IMAGENET_IMAGES, *([_HUGE] if huge else []))],
    }


def to_text(report: dict[str, Any]) -> str:
    state, resumed = report["cursor"], report["resuming"]
    lines = [
        f"cursor at step {state['step']:,}: {state['bytes']} bytes, {state['changed_bytes']} with two datasets and "
        f"{state['changes']} changes of batch and weights",
        f"resuming at step {resumed['step']:,}: {resumed['seconds']:.2f} s to the first batch, "
        f"{resumed['planned_seconds']:.2f} s to open and plan {resumed['planned_images']:,} images, "
        f"{resumed['read_seconds']:.2f} s to read and pack",
        "",
        "images       opening  a window  memory at its peak  without the mapped manifest",
    ]
    lines += [
        f"{r['images']:<13,}{r['load_seconds']:>5.2f} s  {r['window_seconds']:>6.2f} s  "
        f"{r['peak_bytes'] / 1e6:>15.0f} MB  {r['anonymous_bytes'] / 1e6:.0f} MB"
        for r in report["memory"]
    ]
    return "\n".join(lines)


def cursor(changes: int = 8) -> dict[str, Any]:
    """Bytes of the cursor as JSON: of a simple run at a late step, and of one whose batch and weights were changed."""
    plain = Plan([open_preset("preset:imagenet256")], 0, "mixed", [Segment(0, BATCH, (1,))])
    manifests = [open_preset("preset:imagenet256", 100_000), open_preset("preset:imagenet1024", 100_000)]
    plan = Plan(manifests, 0, "mixed", [Segment(0, BATCH, (750_000, 250_000))])
    for i in range(1, changes + 1):
        step = i * LATE // (changes + 1)
        wanted = Segment(0, BATCH + 64 * (i % 2), (750_000 - 1000 * i, 250_000 + 1000 * i))
        plan = plan.continued(plan.cursor(step), step, wanted)
    assert len(plan.schedule) == changes + 1
    sizes = [len(json.dumps(asdict(p.cursor(LATE)))) for p in (plain, plan)]
    return {"step": LATE, "bytes": sizes[0], "changed_bytes": sizes[1], "changes": changes}


def resuming() -> dict[str, Any]:
    """Seconds from a cursor to the first batch of rank 0 of 8, in a new process: to open the manifest of 1.28 M images,
    and to plan and assign a step; then to read a batch of as many images from a real dataset, which is small, but at
    the same step."""
    from fitv2_scale.bench.latents import (
        write_latents,  # not at the top: it imports torch, which new processes need not
    )
    from fitv2_scale.bench.loaders import OURS

    with tempfile.TemporaryDirectory() as folder:
        write_columns(f"{folder}/large", IMAGENET_IMAGES)
        write_latents(Path(folder), _READABLE, [OURS])
        large, small = (plan_of(Manifest.load(f"{folder}/{name}")).cursor(LATE) for name in ("large", OURS))
        planned = _in_new_process(_resume, f"{folder}/large", asdict(large), False)
        whole = _in_new_process(_resume, f"{folder}/{OURS}", asdict(small), True)
    return {
        "step": LATE,
        "seconds": planned["planned"] + whole["read"],
        "planned_seconds": planned["planned"],
        "planned_images": IMAGENET_IMAGES,
        "read_seconds": whole["read"],
        "read_images": whole["images"],
    }


def memory(images: int) -> dict[str, Any]:
    """Time and memory of a new process that opens a manifest of ``images`` and plans windows that are far apart."""
    with tempfile.TemporaryDirectory() as folder:
        write_columns(folder, images)
        return {"images": images, **_in_new_process(_plan_far_apart, folder)}


def _resume(url: str, state: dict[str, Any], read: bool) -> dict[str, Any]:
    began = time.perf_counter()
    plan = plan_of(Manifest.load(url)).continued(Cursor(**state), LATE, Segment(0, BATCH, (1,)))
    shapes = shapes_for_plan(plan, COST, _NODES, PACK_TOKENS, LATE)
    planned = time.perf_counter()
    images = 0
    if read:
        with Loader(plan, COST, shapes, 0, _NODES, range(LATE, LATE + 1), 1 << 30) as batches:
            images = sum(int((pack.weight > 0).sum()) for pack in next(batches).packs)
    return {"planned": planned - began, "read": time.perf_counter() - planned, "images": images}


def _plan_far_apart(url: str) -> dict[str, Any]:
    with _watch_memory() as peak:
        began = time.perf_counter()
        plan = plan_of(Manifest.load(url))
        loaded = time.perf_counter()
        for step in _FAR_APART:
            plan.step(step)
        planned = time.perf_counter()
    return {
        "load_seconds": loaded - began,
        "window_seconds": (planned - loaded) / len(_FAR_APART),
        # Not getrusage, whose peak is inherited from the process that started this one.
        "peak_bytes": _status("VmHWM"),
        "anonymous_bytes": peak(),
    }


@contextmanager
def _watch_memory() -> Generator[Callable[[], int]]:
    """Gives a function that returns the peak of this process's anonymous memory in bytes."""
    ended, most = threading.Event(), _status("RssAnon")

    def watch() -> None:
        nonlocal most
        while not ended.wait(_PAUSE):
            most = max(most, _status("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: most
    finally:
        ended.set()
        thread.join()


def _status(name: str) -> int:
    """A field of /proc/self/status, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:"))


def _in_new_process(work: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """``work(*args)`` in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args).result()
