"""A small random VAE, of which tests of the codec sd-vae need the files."""

from pathlib import Path

import pytest
import torch


def save_vae(folder: Path, seed: int = 0, **changes) -> str:
    """Four resolutions, as SD-VAE, with 4 channels instead of 128 to 512."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    config = {"block_out_channels": (4, 4, 4, 4), "norm_num_groups": 2, "latent_channels": 4} | changes
    levels = len(config["block_out_channels"])
    config |= {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    diffusers.AutoencoderKL(**config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory) -> str:
    return save_vae(tmp_path_factory.mktemp("vae"))
