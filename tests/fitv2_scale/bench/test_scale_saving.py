"""How the host work of saves grows with the ranks: counted, not timed."""

import math
import pickle

from fitv2_scale.bench.scale_saving import MODEL, measure_saving, shard_table
from fitv2_scale.config.model import ModelConfig
from fitv2_scale.model.counts import logical_shapes, parameter_count

SMALL = ModelConfig(depth=2, hidden=64, heads=4, classes=10)
PLAN, SAVE = "plan of saves, received", "a save, received"


def test_what_rank_0_receives_grows_at_most_with_the_ranks():
    eight, many = (measure_saving(ranks, SMALL) for ranks in (8, 64))
    assert len(eight) == 12 and eight.keys() == many.keys()
    assert all(value > 0 for value in (*eight.values(), *many.values()))
    for name in (PLAN, SAVE):
        copies, one = (f"{name}, 8 ranks a copy", "MB"), (f"{name}, one copy", "MB")
        assert eight[copies] == many[copies] == eight[one]  # other copies are silent
        assert many[one] <= 8 * eight[one]
    assert many[f"{SAVE}, one copy", "MB"] < 64 * 200 / 1e6  # bytes: a size, and a digest of 16 MiB


def test_the_boxes_are_those_of_3b():
    """2,292 boxes on the first of 8 ranks, 48 bytes each, which hold an eighth of 12.1 billion elements."""
    shapes = {f"{kind}/{name}": shape for name, shape in logical_shapes(MODEL).items() for kind in range(4)}
    tables = [shard_table(shapes, rank, 8) for rank in range(8)]
    assert len(tables[0]) == len(shapes) == 2292
    assert len(pickle.dumps(tables[0])) < 2292 * 48 + 500
    elements = [sum(math.prod(map(int, row[3:5])) for row in table) for table in tables]
    assert sum(elements) == 4 * parameter_count(MODEL)
    assert max(elements) <= 1.001 * sum(elements) / 8
