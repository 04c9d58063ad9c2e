"""Ranks are asked whether they were told the same: each computes its share of every step from what it has read itself.

A fact is a name with a JSON-like value. Ranks exchange one digest of all their facts; values travel only if digests
differ, and then only those of the first few groups of ranks, so that it takes as long for a thousand ranks.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from data_sharding.errors import UserError
from fitv2_scale.parallel.failures import arisen_on, portable, shared
from fitv2_scale.parallel.rank_names import name_ranks
from fitv2_scale.parallel.world import World
from fitv2_scale.run.redact import redact

T = TypeVar("T")
Facts = dict[str, Any]

# What the sentence about a difference holds at most.
_GROUPS, _NAMES, _CHARACTERS = 4, 5, 100

# Seconds for what rank 0 has written to appear on other nodes, longer than NFS keeps what it knows of a folder; and
# between two looks.
_APPEARING, _LOOK = 90.0, 0.5


def agree(world: World, facts: Facts) -> None:
    """Returns if all ranks give the same facts. A collective.

    Raises:
        UserError: on all ranks, and it names the facts that differ, their values, the ranks and their nodes.
    """
    read_alike(world, lambda: (None, facts))


def read_alike(world: World, read: Callable[[], tuple[T, Facts]]) -> T:
    """What ``read`` returns, once every rank has read the same facts. ``read`` must not need the other ranks.

    Raises:
        Exception: what ``read`` raised on this rank or, as ``World.raise_shared`` does, on another.
        UserError: as ``agree`` does.
    """
    result: tuple[T, Facts] | None = None
    failure = None
    try:
        result = read()
    except Exception as error:
        failure = error
    facts = result[1] if result else {}
    told = world.all_gather((_digest(facts), portable(failure)))
    if error := shared([error for _, error in told], failure, world.rank, world.place):
        raise error
    if len({digest for digest, _ in told}) > 1:
        remedy = "start all of them with the same command, config, code and data"
        error = UserError(f"the ranks were not told the same: {difference(world, facts)}; {remedy}")
        raise error if world.is_first else arisen_on(world.place(0), error)
    assert result is not None  # else it has failed
    return result[0]


def require_shared(world: World, place: str, appears: Callable[[], bool]) -> None:
    """Returns once ``appears`` is true on every rank: it looks in ``place`` for what rank 0 has just written there, and
    nobody else. A copy of the place has all but that. A collective.

    Raises:
        Exception: what ``appears`` raised on this rank or, as ``World.raise_shared`` does, on another.
        UserError: on all ranks, if some have another place of that name; it names them and their nodes.
    """
    there, failure = False, None
    try:
        there = _waited_for(appears)
    except Exception as error:
        failure = error
    world.raise_shared(failure)
    without = [rank for rank, found in enumerate(world.all_gather(there)) if not found]
    if without:
        error = UserError(
            f"{place} of {name_ranks(without, world.nodes)} is not that of rank 0, whose files do not appear there: "
            "give a place that all nodes share"
        )
        raise error if world.is_first else arisen_on(world.place(0), error)


def _waited_for(appears: Callable[[], bool]) -> bool:
    until = time.monotonic() + _APPEARING
    while not (there := appears()) and time.monotonic() < until:
        time.sleep(_LOOK)
    return there


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Told:
    """The facts of some ranks that have the same."""

    ranks: list[int]
    digests: dict[str, str]  # of each value, by name
    texts: dict[str, str]  # as it may be printed


def difference(world: World, facts: Facts | None) -> str:
    """What differs in the facts of the ranks, the same text on all; those that give None are left out. A collective."""
    digests = world.all_gather(None if facts is None else _digest(facts))
    kinds = [digest for digest in dict.fromkeys(digests) if digest is not None]
    groups = [[rank for rank, one in enumerate(digests) if one == digest] for digest in kinds]
    facts = facts or {}
    mine = {name: _digest(value) for name, value in facts.items()}, {name: _text(name, facts[name]) for name in facts}
    told = [_Told(ranks, *world.broadcast(mine, ranks[0])) for ranks in groups[:_GROUPS]]
    names = sorted({name for one in told for name in one.digests})
    differing = [name for name in names if len({one.digests.get(name) for one in told}) > 1]
    what = "; ".join(_line(name, told, world.nodes) for name in differing[:_NAMES])
    if more := differing[_NAMES:]:
        what += f"; and {len(more)} more: {', '.join(more[:_NAMES])}" + (", …" if len(more) > _NAMES else "")
    if len(groups) > _GROUPS:
        what += f"; and {len(groups) - _GROUPS} more groups of ranks differ from these"
    return what


def _line(name: str, told: Sequence[_Told], nodes: Sequence[str]) -> str:
    """ "optimizer.lr is 0.001 on ranks 0, 2-7 (n1) and 0.5 on rank 1 (n2)"."""
    ranks: dict[str | None, list[int]] = {}
    texts: dict[str | None, str] = {}
    for one in told:
        digest = one.digests.get(name)
        ranks.setdefault(digest, []).extend(one.ranks)
        texts[digest] = one.texts.get(name, "(absent)")
    hidden = " (what differs is not shown)" if len(set(texts.values())) < len(texts) else ""
    return f"{name} is " + " and ".join(f"{texts[d]} on {name_ranks(ranks[d], nodes)}" for d in ranks) + hidden


def _text(name: str, value: Any) -> str:
    """A value without secrets, and not too long."""
    key = name.rpartition(".")[2]
    value = value[: 10 * _CHARACTERS] if isinstance(value, str) else value  # looking for secrets takes time
    text = json.dumps(redact({key: value})[key], sort_keys=True, ensure_ascii=False, default=str)
    return text if len(text) <= _CHARACTERS else f"{text[: _CHARACTERS - 1]}…"
