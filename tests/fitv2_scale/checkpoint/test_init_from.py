"""Each rank takes its parts of initial weights from a file, for weights and EMA alike."""

import torch
from safetensors.torch import save_file

from fitv2_scale.checkpoint.init_from import load_initial_weights
from fitv2_scale.config.model import ModelConfig
from fitv2_scale.model.counts import logical_shapes
from fitv2_scale.parallel.boxes import Box, LogicalTensor
from fitv2_scale.parallel.world import join
from fitv2_scale.run.weights_source import WeightsSource

MODEL = ModelConfig(depth=1, hidden=16, heads=2, classes=3)


class HalfAnEngine:
    """Holds the second half of the rows of each tensor; the first column of a matrix is a box of its own."""

    def __init__(self) -> None:
        self.held, self.was_loaded = {}, False
        for name, shape in logical_shapes(MODEL).items():
            for kind in ("param", "ema"):
                rows, *rest = shape
                first = (rows // 2, *[0] * len(rest))
                part = [Box(first, torch.full((rows - rows // 2, *rest), 9.0))]
                if rest:
                    part = [
                        Box(first, torch.full((rows - rows // 2, 1), 9.0)),
                        Box((rows // 2, 1), torch.full((rows - rows // 2, rest[0] - 1), 9.0)),
                    ]
                self.held[f"{kind}/{name}"] = LogicalTensor(shape, part)

    def boxes(self) -> dict[str, LogicalTensor]:
        return self.held

    def loaded(self) -> None:
        self.was_loaded = True


def test_a_rank_gets_its_boxes_of_a_file(tmp_path):
    torch.manual_seed(3)
    weights = {name: torch.randn(shape) for name, shape in logical_shapes(MODEL).items()}
    save_file(weights, str(tmp_path / "w.safetensors"))
    engine = HalfAnEngine()
    with join() as world:
        load_initial_weights(WeightsSource.parse(str(tmp_path / "w.safetensors")), engine, MODEL, world)
    assert engine.was_loaded
    for name, whole in weights.items():
        for kind in ("param", "ema"):
            found = torch.cat([box.tensor for box in engine.held[f"{kind}/{name}"].boxes], dim=-1)
            assert torch.equal(found, whole[len(whole) // 2 :]), name
