"""What is counted of a training step, as plain data: made in a process of its own, read in another. Needs no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["triton", "product", "attention", "other"]
Phase = Literal["data", "forward", "backward", "step"]
FLOAT8 = "_scaled_mm"  # the name of a product in fp8


@dataclass(frozen=True)
class Kernel:
    """A kernel of a compiled block: one that Inductor wrote (``triton``), or a call of a library."""

    name: str
    kind: Kind
    bytes: int  # that it must read and write, each buffer once
    product: tuple[int, int, int] | None = None  # (rows, columns, summed) of a matrix product


@dataclass(frozen=True)
class CompiledBlock:
    graphs: int
    breaks: int
    forward: tuple[Kernel, ...]
    backward: tuple[Kernel, ...]

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "CompiledBlock":
        return cls(found["graphs"], found["breaks"], _kernels(found["forward"]), _kernels(found["backward"]))


def _kernels(found: Sequence[dict[str, Any]]) -> tuple[Kernel, ...]:
    return tuple(Kernel(**k | {"product": k["product"] and tuple(k["product"])}) for k in found)


@dataclass(frozen=True)
class Operation:
    """Equal operations of a step of one rank, outside of the blocks."""

    phase: Phase
    name: str
    bytes: int  # of one: read and written; of a collective: of its largest tensor
    dtype: str
    collective: bool
    count: int


@dataclass(frozen=True)
class OuterStep:
    """One step of one rank, without what its blocks compute."""

    operations: tuple[Operation, ...]
    trained: int  # numbers that this rank trains

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "OuterStep":
        return cls(tuple(Operation(**operation) for operation in found["operations"]), found["trained"])

    def collectives(self) -> list[Operation]:
        return [operation for operation in self.operations if operation.collective]

    def of(self, phase: Phase) -> list[Operation]:
        return [op for op in self.operations if op.phase == phase and not op.collective]


@dataclass(frozen=True)
class Workload:
    """A rank's part of a step: ``packs`` packs (a mean) of ``tokens`` tokens in ``slots`` slots."""

    ranks: int
    tokens: int
    slots: int
    max_seqlen: int
    packs: float
    fill: float  # tokens of images over those that the packs have room for
    keys: float  # tokens that a token attends to, on average: the sum of squared lengths over that of lengths
    flops: float  # of the rank, as MFU counts them
