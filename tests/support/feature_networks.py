"""Small random networks in place of Inception: TorchScript files, their digests, and the same network in float64."""

import hashlib
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

POOL, CLASSES = 12, 7


class Tiny(nn.Module):
    """A dict of ``pool`` (N, 12), ``spatial`` (N, 3, 2, 2) and ``logits`` (N, 7) of pictures of any size."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.kernel = nn.Parameter(torch.randn(POOL, 3, 4, 4, generator=generator) / 7)
        self.head = nn.Parameter(torch.randn(POOL, CLASSES, generator=generator))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = nn.functional.conv2d(images.float() / 127.5 - 1, self.kernel, stride=4).tanh()
        pool = x.mean((2, 3))
        return {
            "pool": pool,
            "spatial": nn.functional.adaptive_avg_pool2d(x[:, :3], 2),
            "logits": pool @ self.head,
        }


class PoolAlone(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean((2, 3))


class ByFlags(nn.Module):
    """The signature of the Inception file of StyleGAN2-ADA."""

    def forward(self, images: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        features = images.float().mean((2, 3)) / 255
        if return_features:
            return features
        assert no_output_bias
        return features.softmax(1)


def save_network(module: nn.Module, folder: Path) -> tuple[str, str]:
    """The file and its sha256."""
    file = folder / f"{type(module).__name__}.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is old
        torch.jit.script(module).save(str(file))
    return str(file), hashlib.sha256(file.read_bytes()).hexdigest()
