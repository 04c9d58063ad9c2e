"""Compares the copies of the state (HSDP's replicas, what a tensor group does not split) before a save is written.

If a bit flips in one copy, no computation notices: the copies would train on as two networks, and a commit would hold
one of them. The staged state is compared, the very bytes that are to be written, so all ranks compare the same step. A
rank hashes what it shares with others in the thread that saves, at about 8 GB/s; one sum over the ranks, of 48 bytes a
rank, shows whether all is equal. Only if it is not, ranks exchange the hash of each tensor, to name what differs.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xxhash

from fitv2_scale.parallel.boxes import LogicalTensor
from fitv2_scale.parallel.state_copy import StateCopy
from fitv2_scale.parallel.world import World

_NAMED = 4  # tensors and ranks that a message names at most

Hashes = dict[tuple[int, str], int]  # by the number of the part, the same on all ranks that hold it, and by name


class CopiesDiffer(Exception):
    """The copies of the state are not equal: nothing may be committed, another attempt starts from the last commit."""


def require_equal_copies(
    tensors: Mapping[str, LogicalTensor], scalars: Mapping[str, Any], copy: StateCopy, world: World
) -> None:
    """Raises CopiesDiffer on all ranks, with tensors, ranks and nodes in its message, unless all copies of ``tensors``
    are equal, bit for bit, and all ranks have the same ``scalars``, none of which is NaN. A collective."""
    split, replicated, common = Hashes(), Hashes(), Hashes()
    for name, logical in tensors.items():
        if copy.is_shared(logical.split):
            of_its_kind = split if logical.split else replicated
            of_its_kind[copy.part(logical.split), name] = _hash(*(box.tensor.numpy().data for box in logical.boxes))
    for name, value in scalars.items():
        common[-1, name] = _hash(json.dumps(value).encode())
    suspect, problem = _are_unequal([split, replicated, common], world), ""
    if suspect.any():
        mine = split | replicated | common if suspect[world.rank] else {}
        problem = _difference(world.all_gather(mine), world)
    elif nan := [name for name, value in scalars.items() if value != value]:  # the same on all ranks
        problem = f"{_some(nan)} has no single value"
    if problem:
        raise CopiesDiffer(
            f"step {scalars['step']} is not committed, because the state is corrupt: {problem}. The next attempt "
            "continues from the last commit; if a node is named again, its memory or GPU is faulty: exclude it"
        )


def _are_unequal(kinds: Sequence[Hashes], world: World) -> np.ndarray:
    """Whether a rank's hashes of any kind differ from those of a rank that holds the same: bool (ranks,), the same on
    all ranks."""
    table = np.zeros((world.size, len(kinds), 2), np.int64)  # of each rank and kind: the part, and one hash of all
    for kind, hashes in enumerate(kinds):
        part = next(iter(hashes))[0] if hashes else -1
        table[world.rank, kind] = part, _hash(str(hashes).encode())
    table = world.all_reduce_sum(torch.from_numpy(table)).numpy()
    unequal = np.zeros(world.size, bool)
    for part, sums in table.transpose(1, 2, 0):
        if len(np.unique(part)) < len(np.unique([part, sums], axis=1).T):
            for number in np.unique(part):
                unequal[part == number] |= len(np.unique(sums[part == number])) > 1
    return unequal


def _difference(ranks: Sequence[Hashes], world: World) -> str:
    """What differs, and where, in a sentence. Of three or more copies the ones that differ from most are named."""
    values: dict[tuple[int, str], dict[int, int]] = defaultdict(dict)
    for rank, hashes in enumerate(ranks):
        for key, value in hashes.items():
            values[key][rank] = value
    names, odd = [], Counter[int]()
    for (_, name), by_rank in values.items():
        (usual, count), *others = Counter(by_rank.values()).most_common()
        if others:
            names.append(name)
            agreed = count > len(by_rank) / 2
            odd.update(rank for rank, value in by_rank.items() if not (agreed and value == usual))
    where = [world.place(rank) for rank in sorted(odd)]
    verb = "differs" if len(set(names)) == 1 else "differ"
    return f"{_some(sorted(set(names)))} {verb} between copies that must be equal, on {_some(where)}"


def _some(words: Sequence[str]) -> str:
    more = len(words) - _NAMED
    return ", ".join(words[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _hash(*data: Any) -> int:
    """xxh3_64 of some buffers, as an int64."""
    digest = xxhash.xxh3_64()
    for part in data:
        digest.update(part)
    return digest.intdigest() - (1 << 63)
