"""Ranks that never join are named by those that have.

Each rank writes into the store of the process group which node it is on, and the last one writes that all are there.
On the way it finds out whether all ranks have the same view of something, with one look at the store each.
A rank that has waited for too long, or gets a signal, writes instead who is missing, and all that wait end with that
sentence.
"""

import json
import logging
import os
import time

import torch.distributed as dist

from data_sharding.errors import RanksMissing
from fitv2_scale.parallel.failures import arisen_on, leave
from fitv2_scale.parallel.group_store import ANSWER, SOON, Noted, appears, in_time
from fitv2_scale.parallel.rank_names import guess_nodes, name_ranks

# Keys of the store: how many ranks have joined, the node of each, who has said whom they wait for and who has warned,
# and what was found; the view of the first to come, and whether another one has another.
_JOINED, _NODE, _FOUND = "fitv2/joined", "fitv2/node", "fitv2/found"
_SAID, _WARNED = "fitv2/said", "fitv2/warned"
_VIEW, _VIEWS_DIFFER = "fitv2/view", "fitv2/views-differ"
_ALL_ARE_THERE = "all"

log = logging.getLogger(__name__)


def call_roll(
    store: dist.Store, rank: int, size: int, node: str, patience: float, view: str, noted: Noted
) -> tuple[str, bool]:
    """Returns the first rank's node, and whether all ranks gave the same ``view``, once all have called it. Raises
    RanksMissing on all that have, if others do not come for ``patience`` seconds, or until a signal was ``noted`` on
    one of them."""
    place, began = f"rank {rank} on {node}", time.monotonic()

    def give_up(signal: str) -> None:
        in_time(lambda: _give_up(store, place, size, time.monotonic() - began, signal), ANSWER)

    try:
        found = in_time(lambda: _wait(store, rank, size, node, patience, view), 2 * patience, noted, give_up)
    except (dist.DistError, TimeoutError) as error:  # the server was stopped, or has gone
        raise RanksMissing(
            f"{place} waited for the other ranks to join, and rank 0 or its node does not answer any more: see what "
            "became of it, then start again"
        ) from error
    if found == _ALL_ARE_THERE:
        return store.get(f"{_NODE}/0").decode(), not store.check([_VIEWS_DIFFER])
    missing, origin, sentence = json.loads(found)
    leave(store, rank, size - missing)
    error = RanksMissing(sentence)
    raise error if origin == place else arisen_on(origin, error)


def _wait(store: dist.Store, rank: int, size: int, node: str, patience: float, view: str) -> str:
    """What was found: by the last rank to come, or by the first that has waited for too long."""
    store.set(f"{_NODE}/{rank}", node)
    if store.compare_set(_VIEW, "", view).decode() != view:
        store.set(_VIEWS_DIFFER, "yes")
    if store.add(_JOINED, 1) == size:
        store.compare_set(_FOUND, "", _ALL_ARE_THERE)
    soon = min(SOON, patience / 4)
    if not appears(store, _FOUND, soon) and store.add(_SAID, 1) == 1:
        log.warning("%s; waiting", _who_is_missing(store, size, soon)[1])
    if not appears(store, _FOUND, patience / 2 - soon) and store.add(_WARNED, 1) == 1:
        log.warning("%s; waiting for as long again", _who_is_missing(store, size, patience / 2)[1])
    if not appears(store, _FOUND, patience / 2):
        _give_up(store, f"rank {rank} on {node}", size, patience)
    return store.get(_FOUND).decode()


def _give_up(store: dist.Store, place: str, size: int, seconds: float, signal: str = "") -> str:
    """What is found: that ranks are missing, unless something was found before; or all are about to be there."""
    missing, who = _who_is_missing(store, size, seconds)
    if not missing:
        return store.get(_FOUND).decode()
    sentence = (
        f"{signal} came, and {who}: nothing is lost, start again"
        if signal
        else f"{who}: see whether each was started and what it waits for (an import, a mount, a node that does not "
        "answer), then start again"
    )
    return store.compare_set(_FOUND, "", json.dumps([missing, place, sentence])).decode()


def _who_is_missing(store: dist.Store, size: int, seconds: float) -> tuple[int, str]:
    """How many, and which."""
    known = {rank: store.get(key).decode() for rank in range(size) if store.check([key := f"{_NODE}/{rank}"])}
    nodes = guess_nodes(known, os.environ.get("FITV2_NODES", ""), int(os.environ.get("LOCAL_WORLD_SIZE", 1)), size)
    missing = [rank for rank in range(size) if rank not in known]
    verb = "have" if len(missing) > 1 else "has"
    others = f"the other {len(known)}" if len(known) > 1 else "the other one"
    return len(missing), f"{name_ranks(missing, nodes)} {verb} not joined {others} for {seconds:.0f} s"
