"""Weights files of one network, of one name, and with other numbers in them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fitv2_scale.checkpoint.weights import export_weights
from fitv2_scale.run.run import Run


def weights_of(run: str, folder: Path) -> tuple[str, str]:
    """The EMA weights of ``run`` as folder/weights.safetensors, and the config that describes them."""
    folder.mkdir(parents=True, exist_ok=True)
    file, config = folder / "weights.safetensors", folder / "config.yaml"
    export_weights(run, str(file), ema=True)
    config.write_text(json.dumps(Run.open(run).config))
    return str(file), str(config)


def replace_weights(file: str) -> None:
    """Other numbers in the tensors of ``file``, at the same path and of the same size."""
    weights, generator = load_file(file), torch.Generator().manual_seed(0)
    save_file({k: v + 0.3 * torch.randn(v.shape, generator=generator) for k, v in weights.items()}, file)
