"""The smallest networks, every weight of which matters, and the geometry of packs for them."""

import torch

from data_sharding.plan.pack_layout import PackShape, lay_out
from fitv2_scale.config.model import ModelConfig
from fitv2_scale.model.init import fill_initial
from fitv2_scale.model.network import DiffusionTransformer
from fitv2_scale.model.packed_batch import Packing
from fitv2_scale.model.to_torch import packing_to_torch

TINY = ModelConfig(depth=2, hidden=32, heads=2, classes=5)
DIT = {"qk_norm": "none", "adaln": "full", "mlp": "gelu", "position": "sincos", "outputs": 2}  # and SiT
FIT = {"qk_norm": "none", "adaln": "full", "mlp": "swiglu_4d", "outputs": 2}
SWITCHES = [
    {}, {"qk_norm": "l2_scale"}, {"qk_norm": "none"}, {"adaln": "full"}, {"mlp": "gelu"}, {"mlp": "swiglu_4d"},
    {"position": "sincos"}, {"position": "none"}, {"outputs": 2}, {"patch": 4}, DIT, FIT, DIT | {"patch": 8},
]  # fmt: skip


def build(config: ModelConfig, seed: int = 0, zero: bool = False) -> DiffusionTransformer:
    """The initialised network; unless ``zero``, what starts at zero is drawn too, so that everything matters."""
    network = DiffusionTransformer(config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in network.named_parameters():
            fill_initial(p, name, p.shape, (0,) * p.dim(), seed, config)
            if not zero and not p.any():
                p.normal_(std=0.05)
    return network


def pack(sizes: list[tuple[int, int]], tokens: int, images: int, max_seqlen: int) -> Packing:
    return packing_to_torch(lay_out(sizes, PackShape(tokens, images, max_seqlen)))
