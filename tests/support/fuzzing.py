"""Inputs that a stranger could have written: valid ones, edited; and what a reader may do with them.

A reader may return, or raise an error that its documentation names. It may not end in another exception, hang, or need
more than ten times the input's memory and 64 MB.
"""

import copy
import json
import signal
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from data_sharding.errors import UserError

Input = Callable[[Random], Any]  # draws one

_SECONDS = 20  # for one input, on a busy machine
_FACTOR, _SLACK = 10, 64 << 20  # of the input's bytes, and bytes
_IDLE = 16 << 20  # bytes: a peak so far above the memory in use would hide as much of a reader's
_BLOCK = 50  # inputs that one seed gives

# The short suite reads some of each; `tests/run.sh --long` the full figure.
COUNTS = pytest.mark.parametrize(
    "count", [150, pytest.param(100_000, marks=[pytest.mark.long, pytest.mark.timeout(7200)])]
)

_NUMBERS = [0, 1, 2, 7, 127, 255, 65_535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]
_WORDS = [n.to_bytes(8, order)[-size:] for n in _NUMBERS for size in (1, 4, 8) for order in ("big", "little")]
_MARKS = [b"\0" * 512, b"{", b"]", b'"', b"\n", b"\xff" * 8]
_SPECIAL = [None, True, False, -1, 0, 1, 2**31, 2**63, 2**70, 1e308, float("nan"), float("inf"), 0.5]
_SPECIAL += ["", "0", "../x", "\0", "é" * 40]
_LETTERS = "ab0.-_=/:[]{}\\\"' \t\n\0é\u202e\ud800\U0001f600"


def one_of(*inputs: Input) -> Input:
    """One of these, each as likely."""
    return lambda rng: rng.choice(inputs)(rng)


def text(longest: int) -> Input:
    """Up to so many characters, strange ones among them."""
    return lambda rng: "".join(rng.choices(_LETTERS, k=rng.randint(0, longest)))


def edited_bytes(valid: Sequence[bytes]) -> Input:
    """One of ``valid`` after one to four edits, or bytes that are nothing."""

    def draw(rng: Random) -> bytes:
        if rng.random() < 0.1:
            return rng.randbytes(rng.randint(0, 300))
        data = rng.choice(valid)
        for _ in range(rng.randint(1, 4)):
            data = _edit_bytes(data, rng)
        return data

    return draw


def edited_trees(valid: Sequence[Any]) -> Input:
    """One of ``valid`` (JSON-like values) after one to three edits."""

    def draw(rng: Random) -> Any:
        tree = copy.deepcopy(rng.choice(valid))
        for _ in range(rng.randint(1, 3)):
            tree = _edit_tree(tree, rng)
        return tree

    return draw


def as_json(trees: Input) -> Input:
    return lambda rng: json.dumps(trees(rng)).encode()


def fuzz(
    inputs: Input, read: Callable[[Any], Any], count: int, allowed: tuple = (), size: Callable[[Any], int] = len
) -> None:
    """Calls ``read`` with ``count`` of ``inputs``. Fails at the first that it does not survive, and says the seed that
    gives it again."""

    # The first failure is reported as it came: a smaller seed would not be a smaller input.
    few = {"max_examples": count // _BLOCK, "phases": [Phase.generate], "suppress_health_check": list(HealthCheck)}

    @settings(database=None, deadline=None, **few)
    @given(st.integers(0, 2**64 - 1))
    def reads(seed: int) -> None:
        rng = Random(seed)
        for _ in range(_BLOCK):
            drawn = inputs(rng)
            with _limits(size(drawn)):
                try:
                    read(drawn)
                except (UserError, *allowed) as error:
                    assert str(error), "an error without a sentence"

    reads()


@contextmanager
def _limits(size: int) -> Generator[None]:
    """Fails if the block takes too long, or too much memory for an input of ``size`` bytes."""

    def late(*_: object) -> None:
        raise AssertionError(f"no answer within {_SECONDS} s")

    before, peak = _memory()
    if peak - before > _IDLE:
        Path("/proc/self/clear_refs").write_text("5")  # makes it the memory in use, see ``man proc_pid_clear_refs``
    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    assert _memory()[1] - before <= _FACTOR * size + _SLACK, "too much memory"


def _memory() -> tuple[int, int]:
    """Bytes of this process: in use, and their peak."""
    status = Path("/proc/self/status").read_text()
    used, peak = (int(status.split(f"{field}:", 1)[1].split(None, 1)[0]) for field in ("VmRSS", "VmHWM"))
    return used * 1024, peak * 1024


def _edit_bytes(data: bytes, rng: Random) -> bytes:
    kind = rng.choice(("overwrite", "insert", "delete", "repeat", "truncate"))
    at, length = rng.randint(0, len(data)), rng.randint(1, 600)
    piece = rng.choice((rng.choice(_WORDS), rng.randbytes(rng.randint(1, 12)), rng.choice(_MARKS)))
    if kind == "overwrite":
        return data[:at] + piece + data[at + len(piece) :]
    if kind == "insert":
        return data[:at] + piece + data[at:]
    if kind == "delete":
        return data[:at] + data[at + length :]
    if kind == "repeat":
        return data[:at] + data[at : at + length] * 2 + data[at + length :]
    return data[:at]


def _leaf(rng: Random) -> Any:
    numbers: Input = lambda r: r.getrandbits(r.choice((3, 16, 70))) * r.choice((1, -1))  # noqa: E731
    return one_of(lambda r: r.choice(_SPECIAL), numbers, text(8))(rng)


def _value(rng: Random) -> Any:
    kind, count = rng.randrange(3), rng.randint(0, 3)
    if kind == 0:
        return _leaf(rng)
    if kind == 1:
        return [_leaf(rng) for _ in range(count)]
    return {text(5)(rng): _leaf(rng) for _ in range(count)}


def _edit_tree(tree: Any, rng: Random) -> Any:
    """Edits a node that a random path leads to."""
    kind, value = rng.choice(("replace", "remove", "add", "repeat")), _value(rng)
    parent: Any = None
    key: Any = None
    node = tree
    for _ in range(rng.randint(0, 5)):
        if not isinstance(node, dict | list) or not node:
            break
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        parent, node = node, node[key]
    if parent is None:
        return value if kind == "replace" else tree
    if kind == "replace":
        parent[key] = value
    elif kind == "remove":
        del parent[key]
    elif isinstance(parent, dict):
        parent[f"{key}x" if kind == "add" else key] = value if kind == "add" else [node, node]
    else:
        parent.insert(key, value if kind == "add" else node)
    return tree
