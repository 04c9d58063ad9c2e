"""One measurement: a process of its own that opens one way's data and takes batches, as a trainer would.

    python -m fitv2_scale.bench.measure_loader '{"way": "files", "source": {…}, "seconds": 3.0}'

Prints a JSON object as its last line. A process each, so that no way finds threads, memory or workers of another.
"""

import importlib
import json
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

from fitv2_scale.bench.loaders import Batch, Source, load_way

_PAGE = 1024  # float32 in a page of memory


def consume(way: str, source: Source, seconds: float, ids: bool = False) -> dict[str, Any]:
    """The first epoch, opening included ("cold"), then as many as start within ``seconds``, at least one ("warm").

    ``cpu_seconds`` are those of this process and its workers, over all of it.
    """
    epochs = load_way(way).epochs
    if source.is_s3:
        importlib.import_module("s3fs")  # fsspec would only now; no other import is counted either
    cpu, began = _cpu_seconds(), time.perf_counter()
    opened = epochs(source)
    cold = _take(next(opened), began)
    found = cold.pop("ids")
    warm: dict[str, Any] = {"images": 0, "tokens": 0, "seconds": 0.0}
    while not warm["images"] or warm["seconds"] < seconds:
        epoch = _take(next(opened), time.perf_counter())
        warm = {key: warm[key] + epoch[key] for key in warm}
    opened.close()
    del opened  # workers end, and are counted
    used = _cpu_seconds() - cpu
    report = {"cold": cold, "warm": warm, "cpu_seconds": used}
    return report | ({"ids": found} if ids else {})


def _take(batches: Iterator[Batch], began: float) -> dict[str, Any]:
    images, tokens, ids = 0, 0, []
    for batch in batches:
        batch.latents.view(-1)[::_PAGE].sum()  # touches every page
        images, tokens = images + len(batch.sample_id), tokens + batch.tokens
        ids += batch.sample_id.tolist()
    return {"images": images, "tokens": tokens, "seconds": time.perf_counter() - began, "ids": ids}


def _cpu_seconds() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(json.dumps(consume(asked["way"], Source(**asked["source"]), asked["seconds"], asked.get("ids", False))))
