"""Which boxes each rank saves, and where in its file.

Both follow from the layout, which stays as it is in an attempt. So ranks exchange them once, a few numbers a box, and
rank 0 keeps what the manifest says about boxes as text; at a save only sizes and digests of files are exchanged.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import xxhash
from torch import Tensor

from fitv2_scale.checkpoint.box_table import Shapes, require_covered, table_of, tensors_json
from fitv2_scale.checkpoint.safetensors_file import TensorToWrite, head_of
from fitv2_scale.parallel.boxes import LogicalTensor
from fitv2_scale.parallel.world import World

_FILE = "rank-%05d.safetensors"


@dataclass(frozen=True)
class SavePlan:
    """What this rank saves. Each save writes what is in the boxes' memory by then."""

    names: list[str]  # of all tensors
    entries: list[TensorToWrite]
    listed: bytes  # on rank 0: the manifest's "tensors"

    @classmethod
    def of(cls, tensors: Mapping[str, LogicalTensor], ranks: World) -> "SavePlan":
        """To save ``tensors``, of which all ranks together hold each element once. A collective; all ranks give the
        same names and shapes. Raises ValueError on all ranks if an element is missing, or held twice."""
        entries, boxes = list[TensorToWrite](), []
        for number, (name, logical) in enumerate(tensors.items()):
            for box in logical.boxes:
                assert box.tensor.dtype == torch.float32, "state is kept in float32"
                shape = tuple(box.tensor.shape)
                if box.tensor.numel():
                    key = f"{name}@{','.join(map(str, box.offset))}"
                    entries.append(TensorToWrite(key, torch.float32, shape, partial(_itself, box.tensor)))
                    boxes.append((number, box.offset, shape))
        _, begins = head_of(entries)
        shapes = {name: tuple(logical.shape) for name, logical in tensors.items()}
        table = table_of(shapes, [(*box, begin) for box, begin in zip(boxes, begins.values(), strict=True)])
        told, text = ranks.gather((digest_of(shapes), table) if boxes else None), b""

        def listing() -> None:
            nonlocal text
            text = listed(shapes, told)

        ranks.run_on_rank0(listing)
        return cls(list(tensors), entries, text)


def listed(shapes: Shapes, told: Sequence[tuple[int, np.ndarray] | None]) -> bytes:
    """The manifest's "tensors", from what each rank has told: the digest of its ``shapes``, and the table of its boxes;
    None if it saves nothing. Raises ValueError, see ``SavePlan.of``."""
    digest, saving = digest_of(shapes), {rank: one for rank, one in enumerate(told) if one is not None}
    if others := [rank for rank, (other, _) in saving.items() if other != digest]:
        raise ValueError(f"rank {others[0]} has tensors of other names or shapes than rank 0: they cannot be saved")
    tables = {rank: table for rank, (_, table) in saving.items()} or {0: table_of(shapes, [])}
    require_covered(shapes, tables.values())
    return tensors_json(shapes, tables, _FILE)


def file_of(rank: int) -> str:
    """The name of a rank's file in a commit."""
    return _FILE % rank


def digest_of(shapes: Shapes) -> int:
    """Of names, their order, and shapes."""
    return xxhash.xxh3_64_intdigest(json.dumps(list(shapes.items())).encode())


def _itself(tensor: Tensor) -> Tensor:
    return tensor
