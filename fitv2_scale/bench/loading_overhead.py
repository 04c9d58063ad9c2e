"""Measures what loading costs a rank that trains: its loader alone, at the pace of a GPU.

    python -m fitv2_scale.bench.loading_overhead '{"config": {…}, "ranks": 8, "rate": 114.0}'

Prints a JSON object as its last line.
"""

import json
import sys
import time
from typing import Any

from fitv2_scale.bench.loaders import LoaderConfig
from fitv2_scale.bench.loaders.fitv2 import open_loader, open_plan, open_reader, to_batch


def loading_overhead(config: LoaderConfig, ranks: int, rate: float) -> dict[str, Any]:
    """Runs rank 0 of ``ranks``, all on one node, over one window of the plan; it sleeps instead of training. On S3 the
    frames that the other ranks would fetch are put into the node's cache before: it fetches one of ``ranks``.

    ``rate`` is in images/s per GPU. ``cpu_share``: CPU seconds of this process, all threads, over the time that the
    steps take at this rate. ``wait_share``: the time that the training thread waits for batches after the first one,
    over the same.
    """
    plan, shapes = open_plan(config, (ranks,))
    steps, step_seconds = plan.window_steps(0), config.batch / ranks / rate
    if config.is_s3:
        (manifest,) = plan.manifests
        for f in range(len(manifest.frame_shard)):
            if f % ranks:
                open_reader(config).read(manifest, f)
    waits = []
    cpu, began = time.process_time(), time.perf_counter()
    with open_loader(config, plan, shapes, 0, (ranks,), range(steps)) as loader:
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
        "images_per_step": config.batch // ranks,
        "step_seconds": step_seconds,
        "steps": steps,
        "cpu_share": used / (steps * step_seconds),
        "wait_share": sum(waits[1:]) / (steps * step_seconds),
        "first_batch_seconds": waits[0],
    }


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    print(json.dumps(loading_overhead(**arguments | {"config": LoaderConfig(**arguments["config"])})))
