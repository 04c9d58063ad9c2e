"""Plots FID against the number of evaluations of the field (NFE); with guidance an evaluation is two passes."""

import io
from typing import Any

from data_sharding.errors import UserError
from data_sharding.storage.store import Store
from fitv2_scale.evaluate.results import guidance


def save_plot(results: list[dict[str, Any]], store: Store, path: str) -> None:
    """FID against NFE, one line for each size, guidance, solver and RoPE mode."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("the plot needs matplotlib: pip install matplotlib; the results are stored") from error
    lines: dict[str, list[tuple[float, float]]] = {}
    for r in results:
        name = f"{r['size']}, {guidance(r)}, {r['solver']}, rope {r['rope']}"
        lines.setdefault(name, []).append((r["nfe"], r["fid"]))
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set_xscale("log")
    axes.set(xlabel="evaluations (NFE)", ylabel="FID", title=f"FID against NFE, {results[0]['images']:,} images")
    axes.set_xticks(ticks := sorted({r["nfe"] for r in results}), [f"{tick:g}" for tick in ticks], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    store.put(path, out.getvalue())
