"""The host work of saving and restoring FiTv2-3B/2 on many ranks, without these: what they would send is made from
shapes alone, and this process does with it what rank 0 does."""

import math
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_sharding.storage.json_bytes import from_json
from data_sharding.storage.local_store import LocalStore
from fitv2_scale.checkpoint.box_table import Shapes, table_of
from fitv2_scale.checkpoint.checksums import CHUNK
from fitv2_scale.checkpoint.commit_files import MANIFEST, CommitReader, CommitWriter
from fitv2_scale.checkpoint.manifest_shape import manifest_of
from fitv2_scale.checkpoint.save_plan import SavePlan, digest_of, file_of, listed
from fitv2_scale.config.model import ModelConfig
from fitv2_scale.model.counts import logical_shapes
from fitv2_scale.parallel.boxes import Box, LogicalTensor

MODEL = ModelConfig(depth=40, hidden=2304, heads=24)  # FiTv2-3B/2
_COPY = 8  # ranks that hold one copy of the state under HSDP
_KINDS = ("param", "ema", "exp_avg", "exp_avg_sq")
_HEAD = 1 << 18  # about the bytes of a file before its tensors
_HEADER = {"step": 0, "attempt": 1, "cursor": None, "scalars": {}, "moments": []}

_Figures = dict[tuple[str, str], float]  # by name and unit
_Place = tuple[int, tuple[int, ...], tuple[int, ...]]  # number of the tensor, offset and shape of a box


def measure_saving(ranks: int, model: ModelConfig = MODEL) -> _Figures:
    """The rows of ``ranks``: with a copy of the state on every 8 of them, and with one on all. CPU seconds, and
    megabytes that rank 0 receives."""
    layouts = {"8 ranks a copy": min(ranks, _COPY), "one copy": ranks}
    return {
        (f"{name}, {layout}", unit): value
        for layout, shard in layouts.items()
        for (name, unit), value in _figures(model, ranks, shard).items()
    }


def _figures(model: ModelConfig, size: int, shard: int) -> _Figures:
    shapes = {f"{kind}/{name}": shape for name, shape in logical_shapes(model).items() for kind in _KINDS}
    tables = [shard_table(shapes, rank, shard) for rank in range(shard)]
    plans = [pickle.dumps((digest_of(shapes), table)) for table in tables]
    reports = [pickle.dumps(_record(shapes, table)) for table in tables]
    silent = [None] * (size - shard)  # the other copies
    planning, text = _timed(lambda: listed(shapes, [*map(pickle.loads, plans), *silent]))
    with tempfile.TemporaryDirectory() as folder:
        for rank, report in enumerate(reports):
            Path(folder, file_of(rank)).touch()
            os.truncate(Path(folder, file_of(rank)), pickle.loads(report)["bytes"])  # no block is written
        writer = CommitWriter(LocalStore(folder), ".", 0, SavePlan([], [], text))
        saving, _ = _timed(lambda: writer.finish(_HEADER, [*map(pickle.loads, reports), *silent]))
        manifest = Path(folder, MANIFEST).read_bytes()
    return {
        ("plan of saves", "CPU s"): planning,
        ("plan of saves, received", "MB"): sum(map(len, plans)) / 1e6,
        ("a save", "CPU s"): saving,
        ("a save, received", "MB"): sum(map(len, reports)) / 1e6,
        **_restoring(manifest, shapes, shard),
    }


def _restoring(manifest: bytes, shapes: Shapes, shard: int) -> _Figures:
    reading, checked = _timed(lambda: pickle.dumps(manifest_of(from_json(manifest, MANIFEST))))
    state = {name: LogicalTensor(shape, []) for name, shape in shapes.items()}
    for number, offset, lengths in _boxes(shapes, shard - 1, shard):
        list(state.values())[number].boxes.append(Box(offset, torch.empty(lengths, device="meta")))
    planning, _ = _timed(lambda: CommitReader(LocalStore("/"), "", pickle.loads(checked)).parts(state))
    return {("restart, manifest", "CPU s"): reading, ("restart, a rank's plan", "CPU s"): planning}


def shard_table(shapes: Shapes, rank: int, shard: int) -> np.ndarray:
    """The table (see ``box_table``) of what FSDP2 keeps on ``rank`` of ``shard`` ranks: some rows of each tensor."""
    boxes, begin = [], _HEAD
    for number, offset, lengths in _boxes(shapes, rank, shard):
        boxes.append((number, offset, lengths, begin))
        begin += 4 * math.prod(lengths)
    return table_of(shapes, boxes)


def _boxes(shapes: Shapes, rank: int, shard: int) -> list[_Place]:
    boxes: list[_Place] = []
    for number, (rows, *rest) in enumerate(shapes.values()):
        first, last = (min(rows, r * -(-rows // shard)) for r in (rank, rank + 1))
        if first < last:
            boxes.append((number, (first, *[0] * len(rest)), (last - first, *rest)))
    return boxes


def _record(shapes: Shapes, table: np.ndarray) -> dict[str, Any]:
    """Of the file that a rank with the boxes of ``table`` writes."""
    dims = max(map(len, shapes.values()))
    size = _HEAD + 4 * int(table[:, 1 + dims : 1 + 2 * dims].prod(1).sum())
    return {"bytes": size, "xxh3_128": [f"{chunk:032x}" for chunk in range(-(-size // CHUNK))]}


def _timed(act: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of this process, and what ``act`` returns."""
    began = time.process_time()
    result = act()
    return time.process_time() - began, result
