"""Ranks and their nodes as messages name them: "ranks 0, 2-7 (n1, n2)"."""

from collections.abc import Mapping, Sequence
from itertools import groupby

_NAMED = 4  # spans of ranks, and nodes, in one message


def name_ranks(ranks: Sequence[int], nodes: Sequence[str | None] | Mapping[int, str]) -> str:
    """``nodes`` by rank; None where a rank's is not known."""
    ranks = sorted(ranks)
    runs = [[rank for _, rank in run] for _, run in groupby(enumerate(ranks), lambda pair: pair[1] - pair[0])]
    spans = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    on = list(dict.fromkeys(node for rank in ranks if (node := nodes[rank])))
    return f"rank{'s' if len(ranks) > 1 else ''} {_few(spans)}" + (f" ({_few(on)})" if on else "")


def guess_nodes(known: Mapping[int, str], told: str, local: int, size: int) -> list[str | None]:
    """Each rank's node, from those of some ranks. ``told`` is what the launcher plans, as in "n1:8,n2:8"; unless it is
    empty, or wrong about a known one, it is followed. Else a rank is where the others of its ``local`` ranks are, as
    torchrun and mpirun place them, if those agree."""
    parts = [part.rpartition(":") for part in told.split(",") if part]
    planned = [node for node, _, ranks in parts for _ in range(int(ranks))]
    if len(planned) == size and all(planned[rank] == node for rank, node in known.items()):
        return [*planned]
    guessed: list[str | None] = []
    for rank in range(size):
        first = rank - rank % local
        near = {known[other] for other in range(first, first + local) if other in known}
        guessed.append(known.get(rank) or (near.pop() if len(near) == 1 else None))
    return guessed


def _few(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
