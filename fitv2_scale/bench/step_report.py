"""The report of `fitv2 bench step` as text."""

from typing import Any

from fitv2_scale.planning.forecast.words import counted


def to_text(report: dict[str, Any]) -> str:
    r, seconds = report, report["seconds_a_step"]
    on = f"{r['ranks']} x {r['machine']}, torch {r['torch']}"
    lines = [
        f"step     {seconds['median']:.4g} s ({seconds['lowest']:.4g} to {seconds['highest']:.4g} in "
        f"{counted(r['rounds'], 'round')} of {counted(r['steps'], 'step')}) on {on}",
        f"speed    {r['images_per_second']:.4g} images/s, {r['tokens_per_second']:.5g} tokens/s, "
        f"{r['tflops_per_device']:.4g} TFLOP/s per device"
        + (f", MFU {r['mfu']:.4f} of {r['peak_tflops']:.0f}" if r["mfu"] else ""),
        "parts    " + ", ".join(f"{part} {1000 * s:.4g} ms" for part, s in r["seconds_by_part"].items()),
    ]
    if r["peak_bytes"] is not None:
        lines.append(
            f"memory   {r['peak_bytes'] / 2**30:.2f} GiB at the peak, {r['planned_peak_bytes'] / 2**30:.2f} planned; "
            f"{counted(r['syncs_in_a_step'], 'synchronization')} per step"
        )
    if "reference" in r:
        theirs, times = r["reference"]["seconds_a_step"], r["reference"]["times_as_long"]
        cpu = r["reference"]["times_the_cpu_seconds"]
        lines.append(
            f"against  the released recipe: {theirs['median']:.4g} s, {times['median']:.3f} times as long "
            f"({times['lowest']:.3f} to {times['highest']:.3f}), {cpu['median']:.3f} times the CPU seconds "
            f"({cpu['lowest']:.3f} to {cpu['highest']:.3f}); layout.checkpointing is "
            f"{r['layout']['checkpointing']} for ours, {r['reference']['checkpointing']} for the reference"
        )
    return "\n".join(lines)
