"""From a logical tensor to what a rank holds and back: each element in one box of one rank, in its place."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fitv2_scale.config.model import ModelConfig
from fitv2_scale.model.counts import logical_parameters
from fitv2_scale.parallel.boxes import LogicalTensor, flat_boxes, rows_boxes
from fitv2_scale.parallel.tensor_pieces import Piece, TensorGroup, local_pieces

MODEL = ModelConfig(depth=1, hidden=48, heads=12, classes=3, qk_norm="l2_scale")  # a SwiGLU of 128 units
TENSORS = logical_parameters(MODEL)


def numbered(shape: tuple[int, ...]) -> torch.Tensor:
    """A logical tensor in which every element is its own index."""
    return torch.arange(int(np.prod(shape))).view(shape).float()


def local_of(pieces: list[Piece], logical: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The local tensor that holds ``pieces``; -1 where it holds nothing of the logical one."""
    local = torch.full(shape, -1.0)
    for p in pieces:
        there = tuple(slice(o, o + n) for o, n in zip(p.local, p.shape, strict=True))
        local[there] = logical[tuple(slice(o, o + n) for o, n in zip(p.offset, p.shape, strict=True))]
    return local


def count(found: LogicalTensor, logical: torch.Tensor, seen: torch.Tensor) -> None:
    """Adds one to ``seen`` for each element in a box, and checks that it is where it belongs."""
    assert found.shape == tuple(logical.shape)
    for box in found.boxes:
        there = tuple(slice(o, o + n) for o, n in zip(box.offset, box.tensor.shape, strict=True))
        assert torch.equal(box.tensor, logical[there])
        seen[there] += 1


def is_split(name: str) -> bool:
    """By name: what attention and the MLP divide by heads and hidden units."""
    return (
        name.endswith(("proj.weight", "fc2.weight", "qk_scale"))
        and name.startswith("blocks.")
        or any(f".{part}." in name for part in ("qkv", "fc1_g", "fc1_x", "fc1"))
    )


def padded(name: str, size: int) -> tuple[int, ...]:
    """The shape of the local tensor, as the network has it."""
    shape = TENSORS[name].shape
    if size == 1 or not is_split(name):
        return shape
    dim = 1 if name.endswith(("proj.weight", "fc2.weight")) else 0
    return tuple(-(-n // size) if d == dim else n for d, n in enumerate(shape))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("name", TENSORS)
def test_every_element_is_in_the_boxes_of_one_rank(name, size):
    """With 1 to 3 shards of rows, as FSDP2 cuts, and of elements, as ZeRO-3 does with padding at the end."""
    logical, shape = numbered(TENSORS[name].shape), padded(name, size)
    for shards in (1, 2, 3):
        by_rows, by_elements = torch.zeros_like(logical), torch.zeros_like(logical)
        for rank in range(size):
            pieces = local_pieces(TENSORS[name], TensorGroup(rank, size))
            local = local_of(pieces, logical, shape)
            rows, elements = -(-shape[0] // shards), -(-local.numel() // shards)
            flat = torch.cat((local.flatten(), torch.full((elements * shards - local.numel(),), -2.0)))
            for shard in range(shards):
                first = min(shard * rows, shape[0])
                count(rows_boxes(pieces, logical.shape, local[first : first + rows], first), logical, by_rows)
                start = shard * elements
                part = flat_boxes(pieces, logical.shape, shape, flat[start : start + elements], start)
                count(part, logical, by_elements)
        copies = 1 if is_split(name) else size
        assert (by_rows == copies).all() and (by_elements == copies).all()


@given(st.integers(1, 7), st.integers(1, 7), st.data())
def test_any_range_of_elements_is_its_rectangles(rows, columns, data):
    """Of a matrix with one piece that leaves an edge of it empty."""
    start = data.draw(st.integers(0, rows * columns))
    length = data.draw(st.integers(0, rows * columns))
    high, wide = data.draw(st.integers(1, rows)), data.draw(st.integers(1, columns))
    logical = numbered((high, wide))
    piece = Piece((0, 0), (0, 0), (high, wide))
    local = local_of([piece], logical, (rows, columns))
    flat = torch.cat((local.flatten(), torch.full((length,), -2.0)))[start : start + length]
    seen = torch.zeros_like(logical)
    found = flat_boxes([piece], logical.shape, local.shape, flat, start)
    count(found, logical, seen)
    inside = torch.zeros(rows * columns)
    inside[start : start + length] = 1
    assert torch.equal(seen, inside.view(rows, columns)[:high, :wide])
    for box in found.boxes:
        box.tensor.fill_(-3)
    assert (flat == -3).sum() == seen.sum()  # boxes are views: what is written into them is there


def test_qkv_is_cut_by_heads():
    """Rank 1 of 3 has heads 4 to 7 of q, of k and of v."""
    name, head = "blocks.0.attn.qkv.weight", MODEL.head_dim
    pieces = local_pieces(TENSORS[name], TensorGroup(1, 3))
    assert [p.offset for p in pieces] == [(k * 48 + 4 * head, 0) for k in range(3)]
    assert [p.local for p in pieces] == [(k * 4 * head, 0) for k in range(3)]
    assert {p.shape for p in pieces} == {(4 * head, 48)}


def test_units_that_do_not_exist_are_in_no_piece():
    """128 units on 3 ranks: 43, 43 and 42."""
    for name, dim in (("blocks.0.mlp.fc1_g.weight", 0), ("blocks.0.mlp.fc2.weight", 1), ("blocks.0.mlp.fc1_x.bias", 0)):
        shares = [local_pieces(TENSORS[name], TensorGroup(rank, 3)) for rank in range(3)]
        assert [share[0].shape[dim] for share in shares] == [43, 43, 42], name
