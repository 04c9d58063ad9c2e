"""FLOPs by formula against torch's own count of the operators that run, at the published sizes (on the meta device)."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fitv2_scale.config.load import load_config
from fitv2_scale.config.model import ModelConfig
from fitv2_scale.model.counts import forward_flops
from fitv2_scale.model.network import DiffusionTransformer
from fitv2_scale.model.packed_batch import Packing
from tests.support.tiny_networks import SWITCHES, pack


def counted(model: ModelConfig, size: tuple[int, int], images: int, train: bool = False) -> int:
    """FLOPs of a pass over images of one size, so that padding them for attention adds nothing."""
    tokens = images * size[0] * size[1]
    layout = vars(pack([size] * images, tokens, images, tokens // images))
    packing = Packing(**{n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in layout.items()})
    with torch.device("meta"):
        network = DiffusionTransformer(model)
        inputs = torch.empty(tokens, model.token_channels), torch.empty(images), torch.empty(images, dtype=torch.int64)
    # The counter does not know every fused kernel; the plain one is two matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = network(*inputs, packing)
        if train:
            out.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("config", ["fitv2_s2", "fitv2_b2", "fitv2_xl2", "fitv2_3b2"])
@pytest.mark.parametrize("size,images", [((16, 16), 2), ((13, 18), 3), ((32, 32), 1)])
def test_forward_pass(config, size, images):
    model = load_config(f"configs/{config}.yaml").model
    assert counted(model, size, images) == images * forward_flops(model, size[0] * size[1])


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_switch(switch):
    model = ModelConfig(depth=3, hidden=96, heads=4).model_copy(update=switch)
    assert counted(model, (12, 9), 3) == 3 * forward_flops(model, 108)


def test_full_adaln_heads():
    model = ModelConfig(depth=12, hidden=768, heads=12, adaln="full")
    assert counted(model, (16, 16), 4) == 4 * forward_flops(model, 256)


@pytest.mark.parametrize("size,images", [((16, 16), 8), ((23, 31), 2)])
def test_a_training_step_is_three_forward_passes(size, images):
    """All but the gradients of what the network is given: latents, the timestep's sinusoid."""
    model = load_config("configs/fitv2_3b2.yaml").model
    expected = 3 * images * forward_flops(model, size[0] * size[1])
    assert counted(model, size, images, train=True) == pytest.approx(expected, rel=1e-3)
