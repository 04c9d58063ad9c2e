"""Inputs that a stranger could have written: valid ones, edited; and what a reader may do with them.

A reader may return, or raise an error that its documentation names. It may not end in another exception, hang, or need
more than ten times the input's memory and 64 MB.
"""

import copy
import signal
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from data_sharding.errors import UserError

_SECONDS = 20  # for one input, on a busy machine
_FACTOR, _SLACK = 10, 64 << 20  # of the input's bytes, and bytes

# The short suite reads some of each; `tests/run.sh --long` the full figure.
COUNTS = pytest.mark.parametrize(
    "count", [150, pytest.param(100_000, marks=[pytest.mark.long, pytest.mark.timeout(7200)])]
)

_NUMBERS = [0, 1, 2, 7, 127, 255, 65_535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]
_WORDS = st.sampled_from(
    [n.to_bytes(8, order)[-size:] for n in _NUMBERS for size in (1, 4, 8) for order in ("big", "little")]
)
_PIECES = st.one_of(
    _WORDS, st.binary(min_size=1, max_size=12), st.sampled_from([b"\0" * 512, b"{", b"]", b'"', b"\n", b"\xff" * 8])
)
_BYTE_EDITS = st.tuples(
    st.sampled_from(["overwrite", "insert", "delete", "repeat", "truncate"]),
    st.integers(0, 2**32),
    st.integers(1, 600),
    _PIECES,
)
_LEAVES = st.one_of(
    st.sampled_from(
        [
            None,
            True,
            False,
            -1,
            0,
            1,
            2**31,
            2**63,
            2**70,
            1e308,
            float("nan"),
            float("inf"),
            0.5,
            "",
            "0",
            "../x",
            "\0",
            "é" * 40,
        ]
    ),
    st.integers(),
    st.text(max_size=8),
)
_VALUES = st.one_of(_LEAVES, st.lists(_LEAVES, max_size=3), st.dictionaries(st.text(max_size=5), _LEAVES, max_size=3))
_TREE_EDITS = st.tuples(
    st.sampled_from(["replace", "remove", "add", "repeat"]), st.lists(st.integers(0, 2**16), max_size=5), _VALUES
)


def edited_bytes(valid: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """One of ``valid`` after one to four edits, or bytes that are nothing."""
    edited = st.builds(
        lambda data, edits: reduce(_edit_bytes, edits, data),
        st.sampled_from(valid),
        st.lists(_BYTE_EDITS, min_size=1, max_size=4),
    )
    return st.one_of(edited, edited, edited, edited, st.binary(max_size=300))


def edited_trees(valid: Sequence[Any]) -> st.SearchStrategy[Any]:
    """One of ``valid`` (JSON-like values) after one to three edits."""
    return st.builds(
        lambda tree, edits: reduce(_edit_tree, edits, copy.deepcopy(tree)),
        st.sampled_from(valid),
        st.lists(_TREE_EDITS, min_size=1, max_size=3),
    )


def fuzz(
    inputs: st.SearchStrategy[Any],
    read: Callable[[Any], Any],
    count: int,
    allowed: tuple = (),
    size: Callable[[Any], int] = len,
) -> None:
    """Calls ``read`` with ``count`` of ``inputs``. Fails at the first that it does not survive."""

    # The first failure is reported as it came: to look for a smaller one takes minutes.
    @settings(max_examples=count, phases=[Phase.generate], database=None, suppress_health_check=list(HealthCheck))
    @given(inputs)
    def reads(given_input: Any) -> None:
        with _limits(size(given_input)):
            try:
                read(given_input)
            except (UserError, *allowed) as error:
                assert str(error), "an error without a sentence"

    reads()


@contextmanager
def _limits(size: int):
    """Fails if the block takes too long, or too much memory for an input of ``size`` bytes."""

    def late(*_: object) -> None:
        raise AssertionError(f"no answer within {_SECONDS} s")

    before = _reset_peak()
    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    assert _resident("VmHWM") - before <= _FACTOR * size + _SLACK, "too much memory"


def _reset_peak() -> int:
    """The memory of this process in bytes, which becomes its peak (see ``man proc_pid_clear_refs``)."""
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _edit_bytes(data: bytes, edit: tuple[str, int, int, bytes]) -> bytes:
    kind, place, length, piece = edit
    at = place % (len(data) + 1)
    if kind == "overwrite":
        return data[:at] + piece + data[at + len(piece) :]
    if kind == "insert":
        return data[:at] + piece + data[at:]
    if kind == "delete":
        return data[:at] + data[at + length :]
    if kind == "repeat":
        return data[:at] + data[at : at + length] * 2 + data[at + length :]
    return data[:at]


def _edit_tree(tree: Any, edit: tuple[str, list[int], Any]) -> Any:
    """Edits what lies at the end of a path: each number chooses a child."""
    kind, path, value = edit
    parent, key, node = None, None, tree
    for number in path:
        if not isinstance(node, dict | list) or not node:
            break
        keys = list(node) if isinstance(node, dict) else range(len(node))
        parent, key = node, keys[number % len(keys)]
        node = parent[key]
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
