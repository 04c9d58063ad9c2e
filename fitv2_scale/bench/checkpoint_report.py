"""The report of `fitv2 bench checkpoint` as text."""

from typing import Any

from fitv2_scale.planning.forecast.words import counted


def to_text(report: dict[str, Any]) -> str:
    r = {
        key: value["median"] if isinstance(value, dict) and "median" in value else value
        for key, value in report.items()
    }
    return "\n".join(
        [
            f"state    {r['bytes'] / 1e6:.0f} MB on {r['ranks']} x {r['machine']}, storage {r['storage']}, "
            f"medians of {counted(r['rounds'], 'round')}",
            f"stall    {1000 * r['stall_seconds']:.1f} ms per save, "
            f"the first {1000 * report['stall_seconds']['first']:.1f} ms; "
            f"{100 * r['stall_share']:.2f} % of the {r['blocking_seconds']:.2f} s of a blocking save",
            f"steps    {r['step_seconds']:.3f} s, {r['step_seconds_while_saving']:.3f} s while a save is in flight",
            f"save     durable after {r['durable_seconds']:.2f} s while training; a blocking save writes "
            f"{r['megabytes_per_second']:.0f} MB/s, {r['share_of_plain']:.2f} of plain writes "
            f"({r['plain_megabytes_per_second']:.0f} MB/s)",
            f"load     {r['load_megabytes_per_second']:.0f} MB/s; on another layout "
            f"{r['load_other_layout_times_as_long']:.2f} times as long; from the page cache "
            f"{r['cached_load_megabytes_per_second']:.0f} MB/s and {r['cached_load_other_layout_times_as_long']:.2f} "
            "times as long",
        ]
    )
