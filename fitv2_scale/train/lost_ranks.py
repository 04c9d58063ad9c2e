"""Which ranks have ended without a word, when a collective breaks because one has: a killed rank tells nobody.

Each rank listens on a UDP port (see ``watchdog``). What is sent to a port that nobody has open any more is answered
with "refused", by the machine of the rank if that still runs.
"""

import socket
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

from fitv2_scale.parallel.failures import RankLost
from fitv2_scale.parallel.rank_names import name_ranks

_PATIENCE = 2.0  # seconds: connections break before all files of a killed process are closed
_PAUSE = 0.1  # seconds, for the answer

Address = tuple[str, int]


def refusing(addresses: Callable[[], Mapping[int, Address]], patience: float = _PATIENCE) -> list[int]:
    """The ranks whose ports are closed, as soon as there are any; none if all answer for so many seconds."""
    until = time.monotonic() + patience
    with ExitStack() as stack:
        probes: dict[int, socket.socket] = {}
        while time.monotonic() < until:
            left = addresses()
            for rank in left.keys() - probes.keys():
                probes[rank] = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
                with suppress(OSError):
                    probes[rank].connect(left[rank])
            refused = [rank for rank in sorted(left) if _is_refused(probes[rank])]
            if refused:
                return refused
            time.sleep(_PAUSE)
    return []


def lost(nodes: Mapping[int, str], logs: Path) -> RankLost:
    """Names the ranks that have ended, by their ``nodes``. A killed one has no log among ``logs`` unless it had
    something to say before."""
    ranks = sorted(nodes)
    if len(ranks) == 1:
        named = f"rank {ranks[0]} on {nodes[ranks[0]]} ended or was killed"
    else:
        named = f"{name_ranks(ranks, nodes)} ended or were killed"
    log = logs / f"rank-{ranks[0]:05d}.log"
    see = [*([str(log)] if log.exists() else []), "what its launcher and the system's log of its node say"]
    return RankLost(f"{named} (out of memory?): see {' and '.join(see)}; then start again", ranks)


def _is_refused(probe: socket.socket) -> bool:
    """Whether the answer to what was sent before has come."""
    try:
        probe.send(b"?")
    except ConnectionRefusedError:
        return True
    except OSError:  # its machine cannot be reached: nothing is known
        pass
    return False
