"""Other families of the network train the same on every layout (see ``layout_grid``)."""

from itertools import product

import pytest

from tests.support.layout_grid import FASTER, Cell, assert_the_same, oracle, run_cell
from tests.support.tiny_networks import DIT, FIT

GRID = [Cell(world, tensor) for world in (1, 2, 3, 4) for tensor in (1, 2) if world % tensor == 0]
# The bias of k, which is not turned here, has no gradient but rounding's: softmax does not see it. AdamW would make
# steps of it; with this epsilon it does not.
SIT = {f"model__{key}": value for key, value in DIT.items()} | {"optimizer__eps": 1e-4, "flow__t_sampler": "uniform"}
FIT_V1 = {f"model__{key}": value for key, value in FIT.items()} | {"objective": "ddpm"}


@pytest.mark.parametrize("engine,cell", [*product(["fsdp", "zero3"], GRID)], ids=str)
def test_a_table_of_sines_and_gelu(engine, cell):
    assert_the_same(run_cell(engine, cell, **SIT), oracle(tuple(SIT.items())))


@pytest.mark.parametrize("engine,cell", [*product(["fsdp", "zero3"], GRID)], ids=str)
def test_a_ddpm_that_learns_its_variance(engine, cell):
    assert_the_same(run_cell(engine, cell, **FIT_V1), oracle(tuple(FIT_V1.items())))


def test_with_written_kernels():
    faster = {key: value for key, value in FASTER.items() if value != "merged"}
    assert_the_same(run_cell("fsdp", Cell(4, 2), **SIT | faster), oracle(tuple(SIT.items())))
