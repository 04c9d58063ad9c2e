"""What a file of torch.save holds, from its opcodes: nothing is unpickled, so nothing in it can act."""

import pickletools
import zipfile
from typing import Any

_MOST_BYTES = 256 << 20  # of the pickle itself; that of 3 B parameters in 1,000 tensors has 200 kB


class _Value:
    """Anything but a text or a dictionary: only that it is there."""


TENSOR = _Value()
_REBUILD = _Value()  # a function that makes a tensor
_ORDERED = _Value()  # the class of ordered dictionaries, in which torch keeps weights


def outline(file: str) -> dict[str, Any] | None:
    """The dictionary at the top of a .bin or .pt file: its text keys, and dictionaries as values in the same way; other
    values are TENSOR or opaque. None if the file is another one. Raises ValueError and zipfile.BadZipFile for a damaged
    one."""
    with zipfile.ZipFile(file) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")][:1] or [None]
        if name is None or archive.getinfo(name).file_size > _MOST_BYTES:
            return None
        top = _run(archive.read(name))
    return top if isinstance(top, dict) else None


def _run(pickled: bytes) -> Any:
    """The object that the opcodes leave, with dictionaries and texts as they are and _Value for all else."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    for opcode, argument, _ in pickletools.genops(pickled):
        name = opcode.name
        if name == "STOP":
            return stack[-1] if stack else None
        if name == "MARK":
            marks.append(len(stack))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[int(argument or 0)] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo.get(int(argument or 0), _Value()))
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _set(stack[-1], [key, value])
        elif name in ("SETITEMS", "APPENDS", "ADDITEMS"):
            items = _pop_to_mark(stack, marks)
            _set(stack[-1], items if name == "SETITEMS" else [])
        else:
            _other(name, opcode, argument, stack, marks)
    return None


def _other(name: str, opcode: pickletools.OpcodeInfo, argument: Any, stack: list[Any], marks: list[int]) -> None:
    """An opcode without a meaning here: takes from the stack and leaves there what it declares."""
    items: list[Any] = []
    taken = opcode.stack_before
    if pickletools.markobject in taken:
        items = _pop_to_mark(stack, marks)
        taken = taken[: taken.index(pickletools.markobject)]
    popped = [stack.pop() for _ in taken if stack]
    if name == "REDUCE" and popped:  # an OrderedDict is made by a call and filled afterwards
        stack.append({} if popped[-1] is _ORDERED else TENSOR if popped[-1] is _REBUILD else _Value())
    elif name == "BUILD" and popped:
        stack.append(popped[-1])  # gets a state, and stays what it is
    elif name in ("GLOBAL", "STACK_GLOBAL"):
        words = str(argument).split() if name == "GLOBAL" else popped[::-1]
        stack.append(_class(words))
    elif name in ("EMPTY_DICT", "DICT"):
        stack.append({})
        _set(stack[-1], items)
    elif isinstance(argument, str) and "UNICODE" in name:
        stack.append(argument)
    else:
        stack += [_Value() for _ in opcode.stack_after if _ is not pickletools.markobject]


def _class(words: list[Any]) -> _Value:
    if words == ["collections", "OrderedDict"]:
        return _ORDERED
    return _REBUILD if words[:1] == ["torch._utils"] and str(words[-1]).startswith("_rebuild_") else _Value()


def _pop_to_mark(stack: list[Any], marks: list[int]) -> list[Any]:
    at = marks.pop() if marks else 0
    items = stack[at:]
    del stack[at:]
    return items


def _set(target: Any, items: list[Any]) -> None:
    if isinstance(target, dict):
        target |= {key: value for key, value in zip(items[::2], items[1::2], strict=False) if isinstance(key, str)}
