"""What `fitv2 bench checkpoint` prints of its figures."""

import statistics
from collections.abc import Sequence
from typing import Any


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def to_text(report: dict[str, Any]) -> str:
    r = {
        key: value["median"] if isinstance(value, dict) and "median" in value else value
        for key, value in report.items()
    }
    return "\n".join(
        [
            f"state    {r['bytes'] / 1e6:.0f} MB on {r['ranks']} x {r['machine']}, storage {r['storage']}, "
            f"medians of {r['rounds']} rounds",
            f"stall    {1000 * r['stall_seconds']:.1f} ms a save, "
            f"the first {1000 * report['stall_seconds']['first']:.1f} ms; "
            f"{100 * r['stall_share']:.2f} % of the {r['blocking_seconds']:.2f} s that a blocking save takes",
            f"steps    {r['step_seconds']:.3f} s, {r['step_seconds_while_saving']:.3f} s while a save is in flight",
            f"save     durable after {r['durable_seconds']:.2f} s while training; waited for, "
            f"{r['megabytes_per_second']:.0f} MB/s, {r['share_of_plain']:.2f} of plain writers "
            f"({r['plain_megabytes_per_second']:.0f} MB/s)",
            f"load     {r['load_megabytes_per_second']:.0f} MB/s; onto another layout "
            f"{r['load_other_layout_times_as_long']:.2f} times as long; again "
            f"{r['cached_load_megabytes_per_second']:.0f} MB/s and {r['cached_load_other_layout_times_as_long']:.2f}",
        ]
    )
