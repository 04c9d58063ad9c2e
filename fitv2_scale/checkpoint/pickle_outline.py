"""What a pickle of torch.save holds, from its opcodes: nothing is unpickled, so nothing in it can act."""

import pickletools
from dataclasses import dataclass
from typing import Any

_DTYPES = {  # by the class of a storage
    "FloatStorage": "torch.float32",
    "HalfStorage": "torch.float16",
    "BFloat16Storage": "torch.bfloat16",
    "DoubleStorage": "torch.float64",
    "LongStorage": "torch.int64",
}


class Opaque:
    """A value of no interest here: only what it is."""

    def __init__(self, kind: str = "value"):
        self.kind = kind


@dataclass(frozen=True)
class _Class:
    """A class or function by its name, never the thing itself."""

    module: str
    name: str


@dataclass(frozen=True)
class TensorOutline:
    """A tensor: its values lie in the record ``storage``. Offset and strides count elements."""

    storage: str
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def outline(pickled: bytes) -> Any:
    """The object of a pickle: dictionaries and tuples as they are, texts and integers, tensors as ``TensorOutline``,
    and ``Opaque`` for all else. Raises ValueError or IndexError for bytes that are no pickle."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    for opcode, argument, _ in pickletools.genops(pickled):
        name = opcode.name
        if name == "STOP":
            return stack[-1]
        if name == "MARK":
            marks.append(len(stack))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[int(argument or 0)] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo.get(int(argument or 0), Opaque()))
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _set(stack[-1], [key, value])
        elif name in ("SETITEMS", "APPENDS", "ADDITEMS"):
            items = _pop_to_mark(stack, marks)
            _set(stack[-1], items if name == "SETITEMS" else [])
        else:
            _other(opcode, argument, stack, marks)
    raise ValueError("it has no end")


def kind_of(value: Any) -> str:
    """What to call a value of an outline."""
    if isinstance(value, Opaque):
        return value.kind
    if isinstance(value, _Class):
        return f"{value.module}.{value.name}"
    return "tensor" if isinstance(value, TensorOutline) else type(value).__name__


def _other(opcode: pickletools.OpcodeInfo, argument: Any, stack: list[Any], marks: list[int]) -> None:
    """Takes from the stack what an opcode declares, and leaves there what it makes."""
    items: list[Any] = []
    taken = opcode.stack_before
    if pickletools.markobject in taken:
        items = _pop_to_mark(stack, marks)
        taken = taken[: taken.index(pickletools.markobject)]
    popped = [stack.pop() for _ in taken if stack][::-1]
    name = opcode.name
    if name in ("REDUCE", "NEWOBJ") and len(popped) == 2:
        stack.append(_called(*popped))
    elif name == "BUILD" and popped:
        stack.append(popped[0])  # gets a state, and stays what it is
    elif name in ("GLOBAL", "STACK_GLOBAL"):
        words = str(argument).split(" ", 1) if name == "GLOBAL" else [str(word) for word in popped]
        stack.append(_Class(*words) if len(words) == 2 else Opaque())
    elif name in ("EMPTY_DICT", "DICT"):
        stack.append({})
        _set(stack[-1], items)
    elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE"):
        stack.append(tuple(items or popped))
    elif name == "BINPERSID":
        stack.append(popped[0] if popped else Opaque())
    else:
        made = [each.name for each in opcode.stack_after if each is not pickletools.markobject]
        is_plain = made in (["int"], ["int_or_bool"], ["str"]) and isinstance(argument, int | str)
        stack += [argument] if is_plain else [Opaque(kind) for kind in made]


def _called(function: Any, arguments: Any) -> Any:
    """What ``function(*arguments)`` would give, for those that make tensors and the dictionaries in which torch keeps
    them."""
    if not isinstance(function, _Class):
        return Opaque()
    if function == _Class("collections", "OrderedDict") and arguments == ():
        return {}
    if function == _Class("torch._utils", "_rebuild_parameter") and isinstance(arguments, tuple) and arguments:
        return arguments[0]
    if function == _Class("torch._utils", "_rebuild_tensor_v2"):
        return _tensor(arguments)
    return Opaque(f"{function.module}.{function.name}")


def _tensor(arguments: Any) -> TensorOutline | Opaque:
    match arguments:
        case (("storage", _Class(_, kind), str(key), _, int()), int(offset), tuple(shape), tuple(strides), *_):
            numbers = (offset, *shape, *strides)
            if len(shape) == len(strides) and all(type(n) is int and n >= 0 for n in numbers):
                return TensorOutline(key, _DTYPES.get(kind, kind), offset, shape, strides)
    return Opaque("tensor of another kind")


def _pop_to_mark(stack: list[Any], marks: list[int]) -> list[Any]:
    at = marks.pop() if marks else 0
    items = stack[at:]
    del stack[at:]
    return items


def _set(target: Any, items: list[Any]) -> None:
    """Keys that are neither text nor number stand for themselves: none is lost."""
    if isinstance(target, dict):
        for key, value in zip(items[::2], items[1::2], strict=False):
            target[key if isinstance(key, str | int) else Opaque()] = value
