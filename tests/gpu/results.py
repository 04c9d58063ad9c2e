"""The results of all parts, in one file: of each job how it ended, and what it measured."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_sharding.storage.atomic_write import atomic_write

Results = dict[str, dict[str, Any]]  # by the name of the job: status, seconds, command and result
FILE = "results.json"


def read(folder: Path) -> Results:
    """Empty where there are none yet."""
    file = folder / FILE
    return json.loads(file.read_text()) if file.exists() else {}


def write(folder: Path, results: Results) -> None:
    with atomic_write(folder / FILE, durable=False) as file:
        file.write(json.dumps(results, indent=1).encode())


def merge(*several: Mapping[str, dict[str, Any]]) -> Results:
    """Of each job the last outcome; but what was measured stays, whatever became of a later try."""
    merged: Results = {}
    for results in several:
        for name, outcome in results.items():
            if outcome["status"] == "ok" or merged.get(name, outcome)["status"] != "ok":
                merged[name] = outcome
    return merged
