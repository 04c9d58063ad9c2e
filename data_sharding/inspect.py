"""Figures of a dataset: counts, classes, bytes, codec and a histogram of lengths; as numbers, text or a picture."""

from pathlib import Path

import numpy as np

from data_sharding.errors import UserError
from data_sharding.format.manifest import Manifest
from data_sharding.format.shard import VIEWS

_BINS = 20
_BAR = 50  # characters of the longest bar


def inspect(url: str) -> dict:
    """The figures of the dataset at ``url``, all JSON types. Lengths are in tokens; an absent view is not counted.

    ``lengths`` maps "resize" and "crop" to {"images", "mean", "min", "max", "counts"}; ``counts[i]`` images have
    bin_edges[i] <= length < bin_edges[i+1]. ``mean_length_mixed`` is the mean in training with both views, which
    draws one of an image's views with equal probability. Reads the manifest only. Raises DataError.
    """
    manifest = Manifest.load(url)
    header, totals = manifest.header, manifest.header.totals
    tokens = manifest.size[:, :, 0].astype(np.int64) * manifest.size[:, :, 1]  # (N, view)
    edges = np.unique(np.linspace(1, header.max_tokens + 1, _BINS + 1).round().astype(int))
    present = tokens > 0
    return {
        "url": manifest.url,
        "digest": manifest.digest,
        "codec": header.codec,
        "dtype": header.dtype,
        "max_tokens": header.max_tokens,
        "samples": totals["samples"],
        "skipped": totals["skipped"],
        "frames": totals["frames"],
        "shards": len(header.shards),
        "bytes": totals["bytes"],
        "images_per_class": dict(
            zip(header.classes, np.bincount(manifest.label, minlength=len(header.classes)).tolist(), strict=True)
        ),
        "mean_length_mixed": float((tokens.sum(1) / present.sum(1)).mean()),
        "bin_edges": edges.tolist(),
        "lengths": {view: _lengths(tokens[present[:, i], i], edges) for i, view in enumerate(VIEWS)},
    }


def to_text(figures: dict) -> str:
    """The figures of ``inspect`` for a terminal."""
    classes = figures["images_per_class"]
    lines = [
        f"{figures['url']}  ({figures['digest'][:16]})",
        f"  {figures['samples']:,} images of {len(classes)} classes ({min(classes.values())} to "
        f"{max(classes.values())} each), {figures['skipped']} skipped",
        f"  {figures['bytes'] / 1e6:,.1f} MB in {figures['frames']:,} frames, {figures['shards']:,} shards",
        f"  codec {figures['codec']['name']} ({str(figures['codec']['digest'])[:16]}), {figures['dtype']}, at most "
        f"{figures['max_tokens']} tokens, mean {figures['mean_length_mixed']:.1f} with views mixed",
    ]
    edges = figures["bin_edges"]
    for view, of in figures["lengths"].items():
        if not of["images"]:
            lines.append(f"  {view}: none")
            continue
        lines.append(f"  {view}: {of['images']:,} images, {of['min']} to {of['max']} tokens, mean {of['mean']:.1f}")
        top = max(of["counts"])
        for low, high, count in zip(edges, edges[1:], of["counts"], strict=False):
            if low <= of["max"] and high > of["min"]:
                lines.append(f"    {low:5d}-{high - 1:<5d} {'█' * round(_BAR * count / top):{_BAR}} {count:,}")
    return "\n".join(lines)


def save_picture(figures: dict, path: str) -> None:
    """The length histogram of ``inspect`` as a picture at local ``path``. Raises UserError without matplotlib, or if
    it cannot be written there."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("a picture needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    edges = np.array(figures["bin_edges"])
    below = np.zeros(len(edges) - 1)
    for view, of in figures["lengths"].items():
        label = f"{view} ({of['images']:,})"
        axes.bar(edges[:-1], of["counts"], np.diff(edges), bottom=below, align="edge", label=label)
        below += of["counts"]
    axes.set(xlabel="tokens", ylabel="images", title=f"{figures['url']}: lengths of the views")
    axes.legend()
    try:
        figure.savefig(path, dpi=120)
    except FileNotFoundError as error:
        raise UserError(f"cannot write {path}: there is no folder {Path(path).parent}, make it first") from error
    except (OSError, ValueError) as error:  # ValueError: a suffix that is no format of pictures
        raise UserError(f"cannot write {path}: {error}") from error


def _lengths(tokens: np.ndarray, edges: np.ndarray) -> dict:
    if not len(tokens):
        return {"images": 0, "mean": None, "min": None, "max": None, "counts": [0] * (len(edges) - 1)}
    return {
        "images": len(tokens),
        "mean": float(tokens.mean()),
        "min": int(tokens.min()),
        "max": int(tokens.max()),
        # np.histogram closes its last bin: as the last edge is max_tokens + 1, that changes nothing
        "counts": np.histogram(tokens, edges)[0].tolist(),
    }
