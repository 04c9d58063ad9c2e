"""Small public weights, as DiT and SiT publish theirs: names, shapes and order written down from their code."""

from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor

from tests.support.tiny_networks import DIT

MODEL = {"depth": 2, "hidden": 32, "heads": 2, "classes": 5, **DIT, "sincos": {"train_side": 4}}  # of the files


def positions(side: int, hidden: int) -> Tensor:
    """DiT's table (1, N, D), by the steps of its get_2d_sincos_pos_embed."""
    frequency = 1.0 / 10000 ** (np.arange(hidden // 4, dtype=np.float64) / (hidden / 4))
    column, row = np.meshgrid(np.arange(side, dtype=np.float32), np.arange(side, dtype=np.float32))
    waves = [np.outer(axis.reshape(-1), frequency) for axis in (column, row)]
    return torch.from_numpy(np.concatenate([f(wave) for wave in waves for f in (np.sin, np.cos)], 1)).float()[None]


def dit_weights(seed: int = 3, patch: int = 2, classes: int = 5, depth: int = 2, side: int = 4) -> OrderedDict:
    """A state dict of DiT: width 32, 4 latent channels, 8 channels out."""
    d, out = 32, 8 * patch**2
    shapes = {
        "x_embedder.proj.weight": (d, 4, patch, patch), "x_embedder.proj.bias": (d,),
        "t_embedder.mlp.0.weight": (d, 256), "t_embedder.mlp.0.bias": (d,),
        "t_embedder.mlp.2.weight": (d, d), "t_embedder.mlp.2.bias": (d,),
        "y_embedder.embedding_table.weight": (classes + 1, d),
    }  # fmt: skip
    for i in range(depth):
        shapes |= {
            f"blocks.{i}.attn.qkv.weight": (3 * d, d), f"blocks.{i}.attn.qkv.bias": (3 * d,),
            f"blocks.{i}.attn.proj.weight": (d, d), f"blocks.{i}.attn.proj.bias": (d,),
            f"blocks.{i}.mlp.fc1.weight": (4 * d, d), f"blocks.{i}.mlp.fc1.bias": (4 * d,),
            f"blocks.{i}.mlp.fc2.weight": (d, 4 * d), f"blocks.{i}.mlp.fc2.bias": (d,),
            f"blocks.{i}.adaLN_modulation.1.weight": (6 * d, d), f"blocks.{i}.adaLN_modulation.1.bias": (6 * d,),
        }  # fmt: skip
    shapes |= {
        "final_layer.linear.weight": (out, d), "final_layer.linear.bias": (out,),
        "final_layer.adaLN_modulation.1.weight": (2 * d, d), "final_layer.adaLN_modulation.1.bias": (2 * d,),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    found = OrderedDict(pos_embed=positions(side, d))
    for name, shape in shapes.items():
        found[name] = 0.2 * torch.randn(shape, generator=generator)
    return found


def diffusers_weights(dit: dict[str, Tensor], depth: int = 2) -> dict[str, Tensor]:
    """The same network as diffusers saves it."""
    found = {}
    for kind in ("weight", "bias"):
        found[f"pos_embed.proj.{kind}"] = dit[f"x_embedder.proj.{kind}"]
        found[f"proj_out_1.{kind}"] = dit[f"final_layer.adaLN_modulation.1.{kind}"]
        found[f"proj_out_2.{kind}"] = dit[f"final_layer.linear.{kind}"]
        for i in range(depth):
            block, embedders = f"transformer_blocks.{i}", f"transformer_blocks.{i}.norm1.emb"
            for part, rows in zip("qkv", dit[f"blocks.{i}.attn.qkv.{kind}"].split(32), strict=True):
                found[f"{block}.attn1.to_{part}.{kind}"] = rows.clone()
            found[f"{block}.attn1.to_out.0.{kind}"] = dit[f"blocks.{i}.attn.proj.{kind}"]
            found[f"{block}.ff.net.0.proj.{kind}"] = dit[f"blocks.{i}.mlp.fc1.{kind}"]
            found[f"{block}.ff.net.2.{kind}"] = dit[f"blocks.{i}.mlp.fc2.{kind}"]
            found[f"{block}.norm1.linear.{kind}"] = dit[f"blocks.{i}.adaLN_modulation.1.{kind}"]
            for ours, theirs in ((0, 1), (2, 2)):
                copy = dit[f"t_embedder.mlp.{ours}.{kind}"].clone()
                found[f"{embedders}.timestep_embedder.linear_{theirs}.{kind}"] = copy
    for i in range(depth):
        table = dit["y_embedder.embedding_table.weight"].clone()
        found[f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight"] = table
    return found
