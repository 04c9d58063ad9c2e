"""Summaries of repeated measurements."""

import statistics
from collections.abc import Sequence


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range of ``values``."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
