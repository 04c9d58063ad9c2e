"""What must grow neither with the dataset nor with the run: the cursor, the time to resume, and memory.

Time and memory are those of fresh processes. Memory is given twice: at its peak, with the pages of the mapped manifest
that the process has touched, which belong to the page cache and are given back when others need room; and without
them (RssAnon), which is what a process cannot do without.
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
from data_sharding.plan.balance import Cost
from data_sharding.plan.pack_shapes import shapes_for_plan
from data_sharding.plan.plan import Cursor, Plan, Segment
from data_sharding.plan.size_presets import IMAGENET_IMAGES, open_preset
from data_sharding.stream.loader import Loader
from fitv2_scale.bench.synthetic import write_columns

LATE = 1_999_000
_HUGE = 100_000_000
_BATCH, _NODES = 256, (8,)
_COST = Cost(linear=6 * 2304, quadratic=1)  # of FiTv2-3B/2
_MAX_TOKENS = 16384
_FAR_APART = (0, 123_456, 400_000, 800_000, 1_200_000, 1_600_000, LATE)
_READABLE = 4096  # images of the dataset that is really read, about 100 MB
_PAUSE = 0.002  # seconds between looks at the memory


def measure(huge: bool = False) -> dict[str, Any]:
    """All figures; with ``huge`` also those of 100 M images, which needs 2 GB of disk in the temporary folder and a
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
    """Bytes of the cursor as JSON: of a plain run at a late step, and of one whose batch and weights have changed."""
    plain = Plan([open_preset("preset:imagenet256")], 0, "mixed", [Segment(0, _BATCH, (1,))])
    manifests = [open_preset("preset:imagenet256", 100_000), open_preset("preset:imagenet1024", 100_000)]
    plan = Plan(manifests, 0, "mixed", [Segment(0, _BATCH, (750_000, 250_000))])
    for i in range(1, changes + 1):
        step = i * LATE // (changes + 1)
        wanted = Segment(0, _BATCH + 64 * (i % 2), (750_000 - 1000 * i, 250_000 + 1000 * i))
        plan = plan.continued(plan.cursor(step), step, wanted)
    assert len(plan.schedule) == changes + 1
    sizes = [len(json.dumps(asdict(p.cursor(LATE)))) for p in (plain, plan)]
    return {"step": LATE, "bytes": sizes[0], "changed_bytes": sizes[1], "changes": changes}


def resuming() -> dict[str, Any]:
    """Seconds from a cursor to the first batch of rank 0 of 8, in a fresh process: the manifest of 1.28 M images opened
    and its step planned and dealt; then a batch of as many images read from a real dataset, small, but at the end of as
    many steps."""
    from fitv2_scale.bench.latents import prepare  # torch, which the fresh processes are not to load
    from fitv2_scale.bench.loaders import OURS

    with tempfile.TemporaryDirectory() as folder:
        write_columns(f"{folder}/large", IMAGENET_IMAGES)
        prepare(Path(folder), _READABLE, [OURS])
        large, small = (_plan(Manifest.load(f"{folder}/{name}")).cursor(LATE) for name in ("large", OURS))
        planned = _fresh(_resume, f"{folder}/large", asdict(large), False)
        whole = _fresh(_resume, f"{folder}/{OURS}", asdict(small), True)
    return {
        "step": LATE,
        "seconds": planned["planned"] + whole["read"],
        "planned_seconds": planned["planned"],
        "planned_images": IMAGENET_IMAGES,
        "read_seconds": whole["read"],
        "read_images": whole["images"],
    }


def memory(images: int) -> dict[str, Any]:
    """Time and memory of a fresh process that opens a manifest of ``images`` and plans windows far apart in it."""
    with tempfile.TemporaryDirectory() as folder:
        write_columns(folder, images)
        return {"images": images, **_fresh(_plan_far_apart, folder)}


def _plan(manifest: Manifest) -> Plan:
    return Plan([manifest], 0, "mixed", [Segment(0, _BATCH, (1,))])


def _resume(url: str, state: dict[str, Any], read: bool) -> dict[str, Any]:
    began = time.perf_counter()
    plan = _plan(Manifest.load(url)).continued(Cursor(**state), LATE, Segment(0, _BATCH, (1,)))
    shapes = shapes_for_plan(plan, LATE, _COST, _NODES, _MAX_TOKENS)
    planned = time.perf_counter()
    images = 0
    if read:
        with Loader(plan, _COST, shapes, 0, _NODES, range(LATE, LATE + 1), 1 << 30) as batches:
            images = sum(int((pack.weight > 0).sum()) for pack in next(batches).packs)
    return {"planned": planned - began, "read": time.perf_counter() - planned, "images": images}


def _plan_far_apart(url: str) -> dict[str, Any]:
    with _watched() as peak:
        began = time.perf_counter()
        plan = _plan(Manifest.load(url))
        loaded = time.perf_counter()
        for step in _FAR_APART:
            plan.step(step)
        planned = time.perf_counter()
    return {
        "load_seconds": loaded - began,
        "window_seconds": (planned - loaded) / len(_FAR_APART),
        # Not getrusage: its peak goes over from the process that started this one.
        "peak_bytes": _status("VmHWM"),
        "anonymous_bytes": peak(),
    }


@contextmanager
def _watched() -> Generator[Callable[[], int]]:
    """Gives a function that says how many bytes of anonymous memory this process has had at most."""
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


def _fresh(work: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """``work(*args)`` in a process of its own that has done nothing before."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args).result()
