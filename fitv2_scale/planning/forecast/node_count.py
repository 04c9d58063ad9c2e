"""How many nodes to train on: each added one must be worth its price."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from data_sharding.errors import UserError

_WORTH = 0.5  # an added node must bring at least this share of what it would bring if time were divided evenly
_TRIED = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclass(frozen=True)
class Choice:
    """One number of nodes: what a step and the whole run would take."""

    nodes: int
    gpus: int
    replicate: int
    seconds_a_step: float
    exposed_seconds: float  # of them, waiting for the network
    goodput: float
    days: float
    gpu_hours: float
    peak_bytes: int
    fits: bool  # into the memory of a GPU


def candidates(gpus_per_node: int, tensor: int, images: int, asked: int) -> list[int]:
    """Numbers of nodes that leave an image to each data-parallel rank; ``asked`` is among them."""
    return [n for n in sorted({*_TRIED, asked}) if n * gpus_per_node // tensor <= images]


def choose(tried: Sequence[Choice]) -> Choice:
    """The largest up to which each added node was worth it, of those that fit. Raises UserError if none fits."""
    fitting = [c for c in tried if c.fits]
    if not fitting:
        raise UserError(
            f"a rank needs {min(c.peak_bytes for c in tried) / 1e9:.0f} GB at least, more than a GPU has: set "
            "layout.checkpointing, or layout.tensor"
        )
    best = fitting[0]
    for more in fitting[1:]:
        added, faster = more.nodes / best.nodes - 1, best.days / more.days - 1
        if faster < _WORTH * added:
            break
        best = more
    return best


def enough(tried: Iterable[Choice]) -> list[Choice]:
    """Of ``tried``, smallest first: as many as ``choose`` and ``explain`` need to say what they say of all."""
    taken: list[Choice] = []
    for choice in tried:
        taken.append(choice)
        if choice.fits and choice.nodes >= 2 * choose(taken).nodes:
            break
    return taken


def explain(tried: Sequence[Choice], best: Choice, images: int) -> str:
    """Why no more than that, in a sentence or two."""
    on = f"{best.nodes} node{'s' if best.nodes > 1 else ''} ({best.gpus} GPUs)"
    more = next((c for c in tried if c.nodes >= 2 * best.nodes and c.fits), None)
    if more is None:
        return f"{on}, the most that leave an image of the {images} of a step to each rank"
    days, cost = 1 - more.days / best.days, more.gpu_hours / best.gpu_hours - 1
    return (
        f"{on}: past that, at {images} images a step, more nodes buy next to nothing; "
        f"{more.nodes} would take {100 * days:.0f} % fewer days and {100 * cost:.0f} % more GPU-hours"
    )


def as_plain(tried: Sequence[Choice], best: Choice, images: int) -> dict[str, Any]:
    return {
        "choice": best.nodes,
        "gpus": best.gpus,
        "layout.replicate": best.replicate,
        "why": explain(tried, best, images),
        "tried": [vars(c) for c in tried],
    }
