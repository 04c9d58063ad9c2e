"""Measures one loader in a process of its own, which opens its data and consumes batches, as a trainer would.

    python -m fitv2_scale.bench.measure_loader '{"loader": "files", "config": {…}, "seconds": 3.0}'

Prints a JSON object as its last line. With one process per loader, none is affected by threads, memory or workers of
another.
"""

import importlib
import json
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

from fitv2_scale.bench.loaders import Batch, LoaderConfig, import_loader

_PAGE = 1024  # float32 in a page of memory


def measure_loader(loader: str, config: LoaderConfig, seconds: float, ids: bool = False) -> dict[str, Any]:
    """Measures the first epoch, opening included ("cold"), and as many as start within ``seconds``, at least one
    ("warm"). ``cpu_seconds`` is the total of this process and its workers."""
    epochs = import_loader(loader).epochs
    if config.is_s3:
        importlib.import_module("s3fs")  # fsspec would import it later, and no import is to be counted
    cpu, began = _cpu_seconds(), time.perf_counter()
    opened = epochs(config)
    cold = _take(next(opened), began)
    found = cold.pop("ids")
    warm: dict[str, Any] = {"images": 0, "tokens": 0, "seconds": 0.0}
    while not warm["images"] or warm["seconds"] < seconds:
        epoch = _take(next(opened), time.perf_counter())
        warm = {key: warm[key] + epoch[key] for key in warm}
    opened.close()
    del opened  # workers end, so that their CPU time is counted
    used = _cpu_seconds() - cpu
    report = {"cold": cold, "warm": warm, "cpu_seconds": used}
    return report | ({"ids": found} if ids else {})


def _take(batches: Iterator[Batch], began: float) -> dict[str, Any]:
    images, tokens, ids = 0, 0, []
    for batch in batches:
        batch.latents.view(-1)[::_PAGE].sum()  # reads from every page
        images, tokens = images + len(batch.sample_id), tokens + batch.tokens
        ids += batch.sample_id.tolist()
    return {"images": images, "tokens": tokens, "seconds": time.perf_counter() - began, "ids": ids}


def _cpu_seconds() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    print(json.dumps(measure_loader(**arguments | {"config": LoaderConfig(**arguments["config"])})))
