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

TABLE = Path(__file__).parent / "predicted.json"
_NETWORK = Path(__file__).parents[2] / "model"
_FREE = {"replicate": "auto", "max_tokens": 16384}  # keys of the layout that a prediction is not made for


def with_prediction(assumptions: Assumptions, config: Config) -> Assumptions:
    """A copy with the MFU that was predicted for ``config``'s network and layout, if there is one; the same if the user
    has given another, or the peak of another GPU."""
    peak = config.tracking.peak_tflops or assumptions.peak_tflops.value
    row = next((row for row in read_table() if _is_of(row, config) and row["peak_tflops"] == peak), None)
    if row is None or assumptions.mfu != PUBLISHED_MFU:
        return assumptions
    changed = "" if row["network"] == network_digest() else "; the network's code has changed since"
    source = (
        f"predicted by `fitv2 bench kernels` for one {row['gpu']} and packs of {row['tokens']:,} tokens, torch "
        f"{row['torch']}; not measured{changed}"
    )
    return replace(assumptions, mfu=Figure(round(row["mfu"], 3), source))


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
