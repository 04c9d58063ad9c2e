"""Whether boxes cover their tensors, against counting each element; their JSON, against the standard library's."""

import json

import numpy as np
import pytest

from fitv2_scale.checkpoint.box_table import require_covered, table_of, tensors_json

SHAPES = {"param/w": (4, 6), "param/b": (5,), "param/t": (2, 3, 2), "param/s": (), "param/w2": (4, 6)}
WHOLE = [(n, (0,) * len(shape), shape, 8) for n, shape in enumerate(SHAPES.values())]


def counts(boxes) -> dict[str, np.ndarray]:
    """How often each element is in a box."""
    found = {name: np.zeros(shape, int) for name, shape in SHAPES.items()}
    for n, offset, shape, _ in boxes:
        at = tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))
        found[list(SHAPES)[n]][at] += 1
    return found


def split(box, dim: int, at: int):
    """The box in two, of which one may be empty."""
    n, offset, shape, begin = box
    moved = tuple(o + at * (d == dim) for d, o in enumerate(offset))
    low, high = (tuple(size if d == dim else s for d, s in enumerate(shape)) for size in (at, shape[dim] - at))
    return (n, offset, low, begin), (n, moved, high, begin)


def cut(rng, boxes):
    """The boxes after some cuts of one of them in two."""
    for _ in range(rng.integers(1, 12)):
        box = boxes.pop(rng.integers(len(boxes)))
        dims = len(box[1])
        dim = rng.integers(dims) if dims else 0
        boxes += split(box, dim, rng.integers(box[2][dim] + 1)) if dims else [box]
    return boxes


def damaged(rng, boxes):
    """One box is dropped, doubled, moved, or longer or shorter along a dim; it stays inside of its tensor."""
    i = rng.integers(len(boxes))
    n, offset, shape, begin = boxes[i]
    full, what = list(SHAPES.values())[n], rng.integers(4)
    if what == 0:
        return boxes[:i] + boxes[i + 1 :]
    if what == 1 or not shape:
        return [*boxes, boxes[i]]
    dim = rng.integers(len(shape))
    at, length = offset[dim], shape[dim]
    if what == 2:
        at = rng.integers(full[dim] - length + 1)
    else:
        length = rng.integers(full[dim] - at + 1)
    offset = tuple(at if d == dim else o for d, o in enumerate(offset))
    shape = tuple(length if d == dim else s for d, s in enumerate(shape))
    return [*boxes[:i], (n, offset, shape, begin), *boxes[i + 1 :]]


@pytest.mark.parametrize("seed", range(40))
def test_boxes_cover_if_each_element_is_counted_once(seed):
    rng = np.random.default_rng(seed)
    boxes = cut(rng, list(WHOLE))
    for _ in range(3):
        tables = [table_of(SHAPES, boxes[rank::3]) for rank in range(3)]
        wrong = [name for name, count in counts(boxes).items() if (count != 1).any()]
        if wrong:
            with pytest.raises(ValueError, match="each element of it, once") as raised:
                require_covered(SHAPES, tables)
            assert str(raised.value).split()[3] in wrong
        else:
            require_covered(SHAPES, tables)
        boxes = damaged(rng, boxes)


def test_two_boxes_of_the_right_size_that_overlap_are_no_cover():
    rows = [(0, (0, 0), (2, 6), 8), (0, (1, 0), (2, 6), 8)]
    with pytest.raises(ValueError, match="the boxes of param/w on all ranks are not each element of it, once"):
        require_covered(SHAPES, [table_of(SHAPES, rows + WHOLE[1:])])


def test_a_tensor_without_any_box_is_named():
    for n, name in enumerate(SHAPES):
        with pytest.raises(ValueError, match=f"the boxes of {name} on all"):
            require_covered(SHAPES, [table_of(SHAPES, WHOLE[:n] + WHOLE[n + 1 :])])


@pytest.mark.parametrize("offset,shape", [((-1, 0), (5, 6)), ((0, 1), (4, 6)), ((1, 0), (4, 6)), ((4, 0), (-4, 6))])
def test_a_box_outside_of_its_tensor_is_refused(offset, shape):
    """The last one would count as the tensor itself: its corners are the same, with the same signs."""
    with pytest.raises(ValueError, match="a box of param/w2 lies outside of it"):
        require_covered(SHAPES, [table_of(SHAPES, WHOLE[:4]), table_of(SHAPES, [(4, offset, shape, 8)])])


def test_tensors_as_json_writes_them():
    """Ranks 1 and 4 save; names in the order in which boxes have them, with what JSON escapes."""
    shapes = {'a"ß%d': (3, 2), "s": (), "c": (4,)}
    ranks = {
        1: [(2, (0,), (1,), 8), (0, (0, 0), (1, 2), 12)],
        4: [(0, (1, 0), (2, 2), 80), (1, (), (), 96), (2, (1,), (3,), 100)],
    }
    boxes = {name: [] for name in ("c", 'a"ß%d', "s")}
    for rank, rows in ranks.items():
        for n, offset, shape, begin in rows:
            file = f"rank-{rank:05d}.bin"
            boxes[list(shapes)[n]].append({"offset": offset, "shape": shape, "file": file, "begin": begin})
    expected = json.dumps({name: {"shape": shapes[name], "boxes": found} for name, found in boxes.items()})
    tables = {rank: table_of(shapes, rows) for rank, rows in ranks.items()}
    assert tensors_json(shapes, tables, "rank-%05d.bin") == expected.encode()
    assert tensors_json(shapes, {0: table_of(shapes, [])}, "rank-%05d.bin") == b"{}"
