"""How many nodes to train on: more of them must shorten the run enough."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from data_sharding.errors import UserError
from fitv2_scale.planning.forecast.words import counted

_WORTH = 0.5  # added nodes must bring at least this share of the speedup of perfect scaling
_TRIED = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclass(frozen=True)
class NodeOption:
    """The forecast for one number of nodes."""

    nodes: int
    gpus: int
    replicate: int
    seconds_a_step: float
    exposed_seconds: float  # of these, waiting for the network
    goodput: float
    days: float
    gpu_hours: float
    peak_bytes: int
    fits: bool  # into the memory of a GPU


def candidates(gpus_per_node: int, tensor: int, images: int, asked: int) -> list[int]:
    """Numbers of nodes with at least one image of a step for each data-parallel rank; ``asked`` is among them."""
    return [n for n in sorted({*_TRIED, asked}) if n * gpus_per_node // tensor <= images]


def choose(tried: Sequence[NodeOption], gpu: str) -> NodeOption:
    """Of the options that fit in the memory of a ``gpu``, the largest up to which each addition was worth it. Raises
    UserError if none fits."""
    fitting = [c for c in tried if c.fits]
    if not fitting:
        raise UserError(
            f"a rank needs at least {min(c.peak_bytes for c in tried) / 1e9:.0f} GB, more than an {gpu} has: set "
            "layout.checkpointing or layout.tensor"
        )
    best = fitting[0]
    for more in fitting[1:]:
        added, faster = more.nodes / best.nodes - 1, best.days / more.days - 1
        if faster < _WORTH * added:
            break
        best = more
    return best


def until_decided(tried: Iterable[NodeOption], gpu: str) -> list[NodeOption]:
    """The first options of ``tried`` (smallest first) with which ``choose`` and ``explain`` give the same answer as
    with all."""
    taken: list[NodeOption] = []
    for choice in tried:
        taken.append(choice)
        if choice.fits and choice.nodes >= 2 * choose(taken, gpu).nodes:
            break
    return taken


def explain(tried: Sequence[NodeOption], best: NodeOption, images: int) -> str:
    """Why not more nodes than ``best``, in one sentence."""
    on = f"{counted(best.nodes, 'node')} ({counted(best.gpus, 'GPU')})"
    more = next((c for c in tried if c.nodes >= 2 * best.nodes and c.fits), None)
    if more is None:
        return f"{on}, the most that still give each rank one of the {images} images of a step"
    days, cost = more.days / best.days - 1, more.gpu_hours / best.gpu_hours - 1
    return (
        f"{on}: with {images} images per step, more nodes hardly shorten the run; "
        f"{more.nodes} would take {100 * abs(days):.0f} % {'more' if days > 0 else 'fewer'} days "
        f"and {100 * cost:.0f} % more GPU-hours"
    )


def node_report(tried: Sequence[NodeOption], best: NodeOption, images: int) -> dict[str, Any]:
    return {
        "choice": best.nodes,
        "gpus": best.gpus,
        "layout.replicate": best.replicate,
        "why": explain(tried, best, images),
        "tried": [vars(c) for c in tried],
    }
