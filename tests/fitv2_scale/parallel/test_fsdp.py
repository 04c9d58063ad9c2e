"""What is particular about the engine ``fsdp``. That it trains as every engine does is in test_tensor."""

import torch

from fitv2_scale.config.schema import Config
from fitv2_scale.model.network import DiffusionTransformer
from fitv2_scale.model.objectives import make_objective
from fitv2_scale.parallel.world import join
from tests.support.layout_grid import STEPS, engine_of, make_config, packs_of
from tests.support.ranks import run_ranks


def differences(config: Config) -> tuple[float, float]:
    """The largest difference between what the network of the engine and a plain one give with the same weights, all of
    which matter, in bfloat16; and between the plain one's with times in float32 and in bfloat16."""
    with join() as world:
        engine, plain = engine_of(config, world), DiffusionTransformer(config.model)
        boxes, weights = engine.boxes(), plain.state_dict()
        for name, weight in weights.items():
            boxes[f"param/{name}"].boxes[0].tensor.copy_(weight.normal_(std=0.3))
        engine.loaded()
        plain = plain.to(torch.bfloat16)
        (pack,) = packs_of(STEPS, 0, 1, 1, 1)  # no step's
        noised = make_objective(config, pack.latents_TC.device).training_batch(pack)
        with torch.no_grad():
            found = engine.network(noised.x_TC, noised.t_I, noised.label_I, pack.packing)
            expected = plain(noised.x_TC, noised.t_I, noised.label_I, pack.packing)
            rounded = plain(noised.x_TC, noised.t_I.bfloat16(), noised.label_I, pack.packing)
        return (found - expected).abs().max().item(), (rounded - expected).abs().max().item()


def test_times_and_positions_are_not_rounded_to_bfloat16():
    """Though blocks compute in it: else close times would be one, and far tokens neighbours."""
    ((off, rounded),) = run_ranks(1, differences, make_config("fsdp", layout__precision="bf16"))
    assert off == 0.0 < rounded
