"""What `fitv2 bench kernels --table` predicted of some networks on a GPU: the table ``predicted.json``."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from fitv2_scale.config.layout import LayoutConfig
from fitv2_scale.config.model import ModelConfig
from fitv2_scale.config.schema import Config
from fitv2_scale.planning.forecast.assumptions import PUBLISHED_MFU, Assumptions, Figure
from fitv2_scale.planning.forecast.gpus import known_gpu

TABLE = Path(__file__).parent / "predicted.json"
_NETWORK = Path(__file__).parents[2] / "model"
_FREE = {"replicate": "auto", "max_tokens": 16384}  # keys of the layout that a prediction is not made for


def with_prediction(assumptions: Assumptions, config: Config) -> Assumptions:
    """A copy with the MFU that was predicted for ``config``'s network on the GPU, by the row whose layout is nearest;
    without a row, or with the peak of another GPU, with the published one. Both say which keys of ``config`` their time
    does not contain. An MFU that the user has given stays."""
    if bench := assumptions.step_bench:
        apart = keys_apart(config, bench.layout, bench.deterministic) if bench.layout else []
        return replace(assumptions, not_in_time=tuple(apart))
    if assumptions.mfu != PUBLISHED_MFU:
        return assumptions
    rows = [row for row in _rows_on(assumptions.gpu) if ModelConfig(**row["model"]) == config.model]
    peak = config.tracking.peak_tflops or assumptions.peak_tflops.value
    found = [(keys_apart(config, LayoutConfig(**row["layout"])), row) for row in rows if row["peak_tflops"] == peak]
    if not found:
        source = (
            f"{PUBLISHED_MFU.source}; none is predicted for this network on an {assumptions.gpu} of {peak:g} TFLOP/s"
        )
        apart = keys_apart(config, LayoutConfig())
        return replace(assumptions, mfu=Figure(PUBLISHED_MFU.value, source), not_in_time=tuple(apart))
    apart, row = min(found, key=lambda one: len(one[0]))
    changed = "" if row["network"] == network_digest() else "; the network's code has changed since"
    source = (
        f"predicted by `fitv2 bench kernels` for one {row['gpu']} and packs of {row['tokens']:,} tokens, torch "
        f"{row['torch']}; not measured{changed}"
    )
    return replace(assumptions, mfu=Figure(round(row["mfu"], 3), source), not_in_time=tuple(apart))


def keys_apart(config: Config, layout: LayoutConfig, deterministic: bool = False) -> list[str]:
    """The keys of ``config``, as key=value, that make a step on a GPU faster or slower than with ``layout``."""
    mine, other = (_compared(one).model_dump() for one in (config.layout, layout))
    if config.layout.compiles(True) == layout.compiles(True):
        del mine["compile"]
    apart = [f"layout.{key}={_text(value)}" for key, value in mine.items() if value != other[key]]
    return apart + ([f"deterministic={_text(config.deterministic)}"] if config.deterministic != deterministic else [])


def not_predictable(layout: LayoutConfig) -> list[str]:
    """The keys of ``layout``, as key=value, with which `fitv2 bench kernels` predicts nothing."""
    return [
        f"layout.{key}={_text(getattr(layout, key))}"
        for key, wrong in {
            "engine": layout.engine != "fsdp",
            "tensor": layout.tensor != 1,
            "precision": layout.precision == "fp32",
            "compile": not layout.compiles(True),
        }.items()
        if wrong
    ]


def how_to_time(config: Config, assumptions: Assumptions) -> str:
    """The command that tells the time of ``config`` with the keys that ``assumptions`` leave out of it."""
    keys = assumptions.not_in_time
    beyond = {*not_predictable(config.layout), f"deterministic={_text(True)}"} & {*keys}
    if assumptions.step_bench or beyond or not _rows_on(assumptions.gpu):
        return "`fitv2 bench step CONFIG --json` measures that on a GPU, for --bench"
    return f"`fitv2 bench kernels CONFIG {' '.join(keys)}` predicts the MFU with that, for --mfu"


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _rows_on(gpu: str) -> list[dict[str, Any]]:
    return [row for row in read_table() if known_gpu(row["gpu"]) == gpu]


def read_table(file: Path = TABLE) -> list[dict[str, Any]]:
    return json.loads(file.read_text())


def with_row(rows: list[dict[str, Any]], config: Config, figures: dict[str, Any]) -> list[dict[str, Any]]:
    """``rows`` with one of ``figures`` for ``config``'s network and layout, instead of that of before."""
    made_for = {
        "model": config.model.model_dump(mode="json"),
        "layout": _compared(config.layout).model_dump(mode="json"),
        "network": network_digest(),
    }
    return [row for row in rows if not (_is_of(row, config) and row["gpu"] == figures["gpu"])] + [figures | made_for]


def network_digest() -> str:
    """Of the network's code."""
    digest = hashlib.sha256()
    for file in sorted(_NETWORK.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _is_of(row: dict[str, Any], config: Config) -> bool:
    """Keys that the row does not have yet mean their defaults."""
    return ModelConfig(**row["model"]) == config.model and LayoutConfig(**row["layout"]) == _compared(config.layout)


def _compared(layout: LayoutConfig) -> LayoutConfig:
    return layout.model_copy(update=_FREE)
