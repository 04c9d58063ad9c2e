"""What loading costs a rank that trains: its loader alone, at the pace of a GPU.

    python -m fitv2_scale.bench.loading_overhead '{"source": {…}, "ranks": 8, "rate": 114.0}'

Prints a JSON object as its last line.
"""

import json
import sys
import time
from typing import Any

from fitv2_scale.bench.loaders import Source
from fitv2_scale.bench.loaders.fitv2 import open_loader, open_plan, open_reader, to_batch


def pace(source: Source, ranks: int, rate: float) -> dict[str, Any]:
    """Rank 0 of ``ranks``, all on one node, over one window of the plan. It sleeps where it would train. On S3 the
    other ranks have brought their parts of the frames to the node's cache already: it fetches one of ``ranks``.

    ``rate`` is in images/s of one GPU. ``cpu_share``: CPU seconds of this process, all threads, over the time that the
    steps take at this rate. ``wait_share``: time that the training thread waits for batches, the first one excepted,
    over the same.
    """
    plan, shapes = open_plan(source, (ranks,))
    steps, step_seconds = plan.window_steps(0), source.batch / ranks / rate
    if source.is_s3:
        (manifest,) = plan.manifests
        for f in range(len(manifest.frame_shard)):
            if f % ranks:
                open_reader(source).read(manifest, f)
    waits = []
    cpu, began = time.process_time(), time.perf_counter()
    with open_loader(source, plan, shapes, 0, (ranks,), range(steps)) as loader:
        for _ in range(steps):
            asked = time.perf_counter()
            for pack in next(loader).packs:
                to_batch(pack)
            waits.append(time.perf_counter() - asked)
            if len(waits) == 1:
                began = time.perf_counter()
            time.sleep(max(0.0, began + len(waits) * step_seconds - time.perf_counter()))
        used = time.process_time() - cpu
    return {
        "ranks": ranks,
        "images_per_step": source.batch // ranks,
        "step_seconds": step_seconds,
        "steps": steps,
        "cpu_share": used / (steps * step_seconds),
        "wait_share": sum(waits[1:]) / (steps * step_seconds),
        "first_batch_seconds": waits[0],
    }


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(json.dumps(pace(Source(**asked["source"]), asked["ranks"], asked["rate"])))
