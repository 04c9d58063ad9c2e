"""JSON values as whole files: records that people may read and a later version must."""

import json
import math
from typing import Any

from data_sharding.errors import DataError
from data_sharding.storage.records import ListOf, Shape

RESTORE = "restore it from a backup"


def to_json(value: Any, indent: int | None = None) -> bytes:
    """The bytes of the file, ASCII; ``indent``: spaces a level, None for a single line."""
    return json.dumps(value, indent=indent).encode()


def parse_json(data: bytes) -> Any:
    """The value in ``data``. Raises ValueError or RecursionError if it is not JSON, or has a number that is not finite:
    no reader here can compute with one."""
    return json.loads(data, parse_float=_finite, parse_constant=_finite)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return number


def from_json(data: bytes, where: str, shape: type[Shape | ListOf] | None = None, remedy: str = RESTORE) -> Any:
    """The value in ``data``, read from the path or URL ``where``. Raises DataError, which ends with ``remedy``, if it
    is not JSON, or not an object of ``shape``."""
    try:
        value = parse_json(data)
        return shape.check(value) if shape else value
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is damaged ({error}); {remedy}.") from error
