"""What planning and dealing achieve: balance and fill by images a rank, any number of ranks, time and memory."""

import time
import tracemalloc
from typing import Any

import numpy as np

from data_sharding.deal import Cost, choose_shapes, deal, spread
from data_sharding.manifest import Manifest
from data_sharding.plan import Plan, Segment
from data_sharding.presets import open_preset

PRESETS = ("preset:imagenet256", "preset:imagenet1024")
BATCH = 256
_COST = Cost(linear=6 * 2304, quadratic=1)  # of FiTv2-3B/2
_MAX_TOKENS = 16384


def measure(steps: int | None = None) -> dict[str, Any]:
    """All figures, over an epoch or ``steps`` steps each; a minute or two for an epoch."""
    return {
        "planning": [planning(url) for url in PRESETS],
        "balance": [balance(url, images, steps) for url in PRESETS for images in (32, 8, 4, 2)],
        "any_ranks": [any_ranks(url, ranks) for url in PRESETS for ranks in (96, 384, 640, 768, 1000)],
    }


def to_text(report: dict[str, Any]) -> str:
    lines = ["data                  images a rank  imbalance  fill    capacities"]
    lines += [
        f"{r['data']:<22}{r['images_per_rank']:>13}  {r['imbalance']:<9.4f}  {r['fill']:.4f}  {r['capacities']}"
        for r in report["balance"]
    ]
    lines += ["", "data                  ranks on a step of 4,096  slowest over lower bound"]
    lines += [f"{r['data']:<22}{r['ranks']:>24}  {r['slowest_over_bound']:.4f}" for r in report["any_ranks"]]
    lines += ["", "data                  planning an epoch  extra memory"]
    lines += [f"{r['data']:<22}{r['seconds']:>15.2f} s  {r['extra_bytes'] / 1e6:.0f} MB" for r in report["planning"]]
    return "\n".join(lines)


def balance(url: str, images_per_rank: int, steps: int | None = None) -> dict[str, Any]:
    """Imbalance and fill over an epoch (or its first ``steps``) of 256-image steps at ``images_per_rank``.

    Imbalance: cost of the slowest rank over the mean, averaged over steps. Fill: valid tokens over ranks x packs x
    capacity. The shapes are chosen on the first window, as a run does.
    """
    plan = _plan(open_preset(url), BATCH)
    ranks = BATCH // images_per_rank
    window = [plan.step(k).tokens for k in range(plan.window_steps(0))]
    shapes = choose_shapes(window, _COST, ranks, _MAX_TOKENS, plan.max_seqlen)
    count = steps or plan.samples[0] // BATCH
    imbalance, tokens, room, seconds = 0.0, 0, 0, 0.0
    for k in range(count):
        lengths = plan.step(k).tokens
        began = time.perf_counter()
        dealt = deal(lengths, _COST, ranks, shapes)
        seconds += time.perf_counter() - began
        cost = _COST.of(lengths)
        loads = [sum(int(cost[pack].sum()) for pack in rank) for rank in dealt.packs]
        imbalance += max(loads) * ranks / sum(loads)
        tokens, room = tokens + int(lengths.sum()), room + ranks * len(dealt.packs[0]) * dealt.shape.tokens
    return {
        "data": url,
        "images_per_rank": images_per_rank,
        "imbalance": imbalance / count,
        "fill": tokens / room,
        "capacities": [shape.tokens for shape in shapes],
        "deal_ms": 1000 * seconds / count,
        "steps": count,
    }


def any_ranks(url: str, ranks: int, batch: int = 4096, steps: int = 4) -> dict[str, Any]:
    """Slowest rank over the lower bound: the mean, the dearest image and, with N = qR + r images, r > 0, the cheapest
    (q + 1) r images over r, since r ranks at least hold q + 1 or more."""
    plan = _plan(open_preset(url, images=batch * 16), batch)
    ratios = []
    for k in range(steps):
        cost = _COST.of(plan.step(k).tokens)
        q, r = divmod(len(cost), ranks)
        bound = max(cost.sum() / ranks, cost.max(), np.sort(cost)[: (q + 1) * r].sum() / r if r else 0)
        ratios.append(max(int(cost[group].sum()) for group in spread(cost, ranks)) / bound)
    return {"data": url, "ranks": ranks, "batch": batch, "slowest_over_bound": float(np.mean(ratios))}


def planning(url: str) -> dict[str, Any]:
    """Time of planning one epoch, one step set after the other, on this core; and, in a second pass over two windows,
    the most memory that planning holds at once."""
    manifest = open_preset(url)
    plan = _plan(manifest, BATCH)
    steps = plan.samples[0] // BATCH
    began = time.perf_counter()
    for k in range(steps):
        plan.step(k)
    seconds = time.perf_counter() - began
    tracemalloc.start()
    again = _plan(manifest, BATCH)
    for k in range(min(steps, 2 * again.window_steps(0))):
        again.step(k)
    extra = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"data": url, "steps": steps, "seconds": seconds, "extra_bytes": extra}


def _plan(manifest: Manifest, batch: int) -> Plan:
    return Plan([manifest], 0, "mixed", [Segment(0, batch, (1,))])
