"""Measures planning and balancing: balance and fill by images per rank, any number of ranks, nodes, time and memory."""

import time
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from data_sharding.plan.balance import Nodes, assign_packs, partition_over_nodes
from data_sharding.plan.groups import group_sums
from data_sharding.plan.pack_shapes import shapes_for_plan
from data_sharding.plan.partition import partition
from data_sharding.plan.plan import MAX_WINDOW_STEPS
from data_sharding.plan.size_presets import open_preset
from fitv2_scale.bench.bias_figures import bias
from fitv2_scale.bench.workload import BATCH, COST, PACK_TOKENS, plan_of

PARTS = ("balance", "any_ranks", "nodes", "bias", "planning")
PRESETS = ("preset:imagenet256", "preset:imagenet1024")
NODES = ((2,) * 4, (8,) * 4, (32,) * 4, (8, 8, 8, 6), (8, 8, 5, 2))
BIAS_STEPS = 1024


def measure(parts: Iterable[str] = PARTS, steps: int | None = None) -> dict[str, Any]:
    """The figures of ``parts``, over an epoch or ``steps`` steps; all of them over an epoch take a minute or two."""
    figures = {
        "balance": lambda: [balance(url, images, steps) for url in PRESETS for images in (32, 8, 4, 2)],
        "any_ranks": lambda: [any_ranks(url, ranks) for url in PRESETS for ranks in (96, 384, 640, 768, 1000)],
        "nodes": lambda: [node_reads(url, nodes, steps) for url in PRESETS for nodes in NODES],
        "bias": lambda: [bias(plan_of(open_preset(url), BATCH), url, steps or BIAS_STEPS) for url in PRESETS],
        "planning": lambda: [planning(url) for url in PRESETS],
    }
    return {part: figures[part]() for part in parts}


def to_text(report: dict[str, Any]) -> str:
    """The parts of ``report`` as tables."""
    tables: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
        "balance": (
            "images per rank  imbalance  fill    capacities",
            lambda r: (
                f"{r['images_per_rank']:>15}  {r['imbalance']:<9.4f}  {r['fill']:.4f}  {r['capacities']}"
                + (f"  (the best pairs: {r['best_pairs']:.4f})" if "best_pairs" in r else "")
            ),
        ),
        "any_ranks": (
            "ranks, 4,096 images  slowest rank over lower bound",
            lambda r: f"{r['ranks']:>20}  {r['slowest_over_bound']:.4f}",
        ),
        "nodes": (
            "ranks of the nodes  bytes read over stored  imbalance",
            lambda r: f"{' + '.join(map(str, r['nodes'])):>18}  {r['read_over_stored']:<22.4f}  {r['imbalance']:.4f}",
        ),
        "bias": (
            "test, one-sided at 0.001  statistic  bound  with sorted steps",
            lambda r: f"{r['test']:<25} {r['statistic']:>9.3f} {r['bound']:>6.3f}  {r['sorted']:.3f}",
        ),
        "planning": (
            "planning an epoch  extra memory",
            lambda r: f"{r['seconds']:>15.2f} s  {r['extra_bytes'] / 1e6:.0f} MB",
        ),
    }
    rows = dict(report)
    if "bias" in rows:
        rows["bias"] = [{"data": r["data"], "test": name, **t} for r in rows["bias"] for name, t in r["tests"].items()]
    texts = [
        "\n".join([f"{'data':<22}{title}", *(f"{r['data']:<22}{row(r)}" for r in rows[part])])
        for part, (title, row) in tables.items()
        if part in rows
    ]
    return "\n\n".join(texts)


def balance(url: str, images_per_rank: int, steps: int | None = None) -> dict[str, Any]:
    """Imbalance and fill over an epoch (or its first ``steps``) of 256-image steps at ``images_per_rank``.

    Imbalance: cost of the slowest rank over the mean, averaged over steps. Fill: valid tokens over ranks x packs x
    capacity. Shapes are chosen as in a run. With two images per rank, ``best_pairs`` is the least possible imbalance of
    pairs of these images: the most expensive with the cheapest.
    """
    plan = plan_of(open_preset(url), BATCH)
    ranks = BATCH // images_per_rank
    shapes = shapes_for_plan(plan, COST, (ranks,), PACK_TOKENS)[0]
    count = steps or plan.samples[0] // BATCH
    imbalance, pairs, tokens, room, seconds = 0.0, 0.0, 0, 0, 0.0
    for k in range(count):
        lengths = plan.step(k).tokens
        began = time.perf_counter()
        assignment = assign_packs(lengths, COST, (ranks,), shapes)
        seconds += time.perf_counter() - began
        cost = COST.of(lengths)
        total = int(cost.sum())
        imbalance += int(assignment.loads(cost).max()) * ranks / total
        ascending = np.sort(cost)
        pairs += int((ascending + ascending[::-1]).max()) * ranks / total
        tokens, room = tokens + int(lengths.sum()), room + ranks * assignment.count * assignment.shape.tokens
    best = {"best_pairs": pairs / count} if images_per_rank == 2 else {}
    return {
        "data": url,
        "images_per_rank": images_per_rank,
        "imbalance": imbalance / count,
        **best,
        "fill": tokens / room,
        "capacities": [shape.tokens for shape in shapes],
        "deal_ms": 1000 * seconds / count,
        "steps": count,
    }


def node_reads(url: str, nodes: Nodes, steps: int | None = None) -> dict[str, Any]:
    """The bytes that nodes read (whole frames) over the stored bytes of the images that they train on; and imbalance.

    Over four windows (or ``steps`` steps), with an LRU cache on each node that holds the frames of one window. All
    images are counted as equally large.
    """
    plan = plan_of(open_preset(url, images=8 * BATCH * MAX_WINDOW_STEPS), BATCH)
    first, window = plan.manifests[0].frame_first, plan.window_steps(0)
    room = -(-window * BATCH * len(first) // int(first[-1]))
    caches: list[OrderedDict[int, None]] = [OrderedDict() for _ in nodes]
    count, read, imbalance = steps or 4 * window, 0, 0.0
    for k in range(count):
        images = plan.step(k)
        cost = COST.of(images.tokens)
        rank = partition_over_nodes(cost, nodes)
        imbalance += int(group_sums(cost, rank, sum(nodes)).max()) * sum(nodes) / int(cost.sum())
        for cache, (begin, end) in zip(caches, pairwise((0, *accumulate(nodes))), strict=True):
            rows = images.row[(rank >= begin) & (rank < end)]
            for frame in np.unique(np.searchsorted(first, rows, side="right") - 1).tolist():
                if frame not in cache:
                    read += int(first[frame + 1] - first[frame])
                cache[frame] = None
                cache.move_to_end(frame)
                if len(cache) > room:
                    cache.popitem(last=False)
    return {"data": url, "nodes": nodes, "read_over_stored": read / (count * BATCH), "imbalance": imbalance / count}


def any_ranks(url: str, ranks: int, batch: int = 4096, steps: int = 4) -> dict[str, Any]:
    """Cost of the slowest of R ranks over the lower bound max(mean cost, most expensive image, and with N = qR + r
    images, r > 0, the cheapest (q + 1) r images / r, since at least r ranks get q + 1 or more images)."""
    plan = plan_of(open_preset(url, images=batch * 16), batch)
    ratios = []
    for k in range(steps):
        cost = COST.of(plan.step(k).tokens)
        q, r = divmod(len(cost), ranks)
        bound = max(cost.sum() / ranks, cost.max(), np.sort(cost)[: (q + 1) * r].sum() / r if r else 0)
        ratios.append(max(int(cost[group].sum()) for group in partition(cost, ranks)) / bound)
    return {"data": url, "ranks": ranks, "batch": batch, "slowest_over_bound": float(np.mean(ratios))}


def planning(url: str) -> dict[str, Any]:
    """CPU seconds of planning one epoch step by step; and, in a second pass over two windows, the peak memory."""
    manifest = open_preset(url)
    plan = plan_of(manifest, BATCH)
    steps = plan.samples[0] // BATCH
    began = time.process_time()
    for k in range(steps):
        plan.step(k)
    seconds = time.process_time() - began
    tracemalloc.start()
    again = plan_of(manifest, BATCH)
    for k in range(min(steps, 2 * again.window_steps(0))):
        again.step(k)
    extra = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"data": url, "steps": steps, "seconds": seconds, "extra_bytes": extra}
