"""The torch backend of keyed random numbers: the same integers as ``data_sharding.rng``, on CPU and CUDA.

Torch has no 64-bit unsigned product, so the words live in int64: a product of two 32-bit words wraps modulo 2**64, and
masking after an arithmetic shift recovers its high word exactly.
"""

import math

import torch
from torch import Tensor

from data_sharding.rng import Purpose, check_seed

_MASK = 0xFFFFFFFF


def words(seed: int, purpose: Purpose, epoch: Tensor | int, ids: Tensor | int, block: Tensor) -> Tensor:
    """Draws ``4 * block .. 4 * block + 3``: int64 words in 0 .. 2**32 - 1, shape (*broadcast shape, 4).

    ``epoch``, ``ids`` and ``block`` are int64 and broadcast; key and counter are laid out as in the NumPy backend.
    """
    check_seed(seed)
    epoch, ids = (torch.as_tensor(a, dtype=torch.int64, device=block.device) for a in (epoch, ids))
    c0, c1, c2, c3 = torch.broadcast_tensors(block, ids & _MASK, (ids >> 32) & _MASK, (int(purpose) << 24) | epoch)
    k0, k1 = seed & _MASK, seed >> 32
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack((c0, c1, c2, c3), -1)


def uniform(words_: Tensor) -> Tensor:
    """Words to float64 in the open interval (0, 1)."""
    return (words_.double() + 0.5) * 2.0**-32


def normal(words_: Tensor) -> Tensor:
    """Words (..., even) to standard normals of the same shape, float64, by Box and Muller on neighbouring pairs.

    In float64, because vectorised float32 logarithms may differ in the last bit with the position in the tensor, which
    depends on the layout; rounding to float32 later removes such differences.
    """
    u = uniform(words_)
    radius, angle = torch.sqrt(-2.0 * torch.log(u[..., 0::2])), (2.0 * math.pi) * u[..., 1::2]
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), -1).flatten(-2)
