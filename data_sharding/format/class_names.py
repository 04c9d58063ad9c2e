"""The class lists of datasets: a label is an index into one, so it means something only together with its list."""

import hashlib
import json
from collections.abc import Sequence

from data_sharding.errors import UserError


def class_digest(classes: Sequence[str]) -> str:
    """Hex sha256 of the names in their order, as a JSON list without spaces."""
    return hashlib.sha256(json.dumps(list(classes), separators=(",", ":")).encode()).hexdigest()


def class_difference(where: str, classes: Sequence[str], other: str, others: Sequence[str]) -> str | None:
    """Which label means two things in the lists of the datasets ``where`` and ``other``; None if they are equal."""
    for label, (name, another) in enumerate(zip(classes, others, strict=False)):
        if name != another:
            return f"label {label} is '{name}' in {where} and '{another}' in {other}"
    if len(classes) != len(others):
        return f"{where} has {len(classes)} classes and {other} has {len(others)}"
    return None


def check_same_classes(where: str, classes: Sequence[str], other: str, others: Sequence[str]) -> None:
    """Raises UserError if a label does not mean the same in the datasets ``where`` and ``other``."""
    if difference := class_difference(where, classes, other, others):
        raise UserError(f"{difference}, but a label must mean one class: write one of them again, with equal classes")
