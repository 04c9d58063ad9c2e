"""Keyed random numbers in plain integers: Philox4x32-10 as published (Salmon et al., SC'11), and what is made of them.

Key and counter are laid out as a run defines them: the key is the seed's two words, the counter (block, the id's two
words, purpose << 24 | epoch). All draws of one block are words 4 * block .. 4 * block + 3 of a stream.
"""

import hashlib
import math

import numpy as np

# The numbers of the purposes are part of every run there is.
NOISE, TIMESTEP, LABEL_DROP, INIT = 1, 2, 3, 9
_LOW = 0xFFFFFFFF


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Ten rounds: each multiplies two words, and the key grows by Weyl's constants."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (right >> 32) ^ b ^ k, right & _LOW, (left >> 32) ^ d ^ m, left & _LOW
        k, m = (k + 0x9E3779B9) & _LOW, (m + 0xBB67AE85) & _LOW
    return a, b, c, d


def words(seed: int, purpose: int, epoch: int, image: int, count: int) -> list[int]:
    """The first ``count`` draws of a stream, each of 32 bits."""
    blocks = (
        philox((block, image & _LOW, image >> 32, purpose << 24 | epoch), (seed & _LOW, seed >> 32))
        for block in range(-(-count // 4))
    )
    return [word for block in blocks for word in block][:count]


def fraction(word: int) -> float:
    """In the open interval (0, 1)."""
    return (word + 0.5) / 2**32


def gaussian(first: int, second: int) -> tuple[float, float]:
    """Two standard normals of two words, by Box and Muller."""
    radius, angle = math.sqrt(-2 * math.log(fraction(first))), 2 * math.pi * fraction(second)
    return radius * math.cos(angle), radius * math.sin(angle)


def gaussians(draws: list[int]) -> np.ndarray:
    """float64, one a draw."""
    pairs = zip(draws[::2], draws[1::2], strict=True)
    return np.array([value for pair in pairs for value in gaussian(*pair)])


def time_of(seed: int, epoch: int, image: int, sampler: str = "logit_normal") -> np.float32:
    """t: the sigmoid of a normal, or uniform."""
    first, second = words(seed, TIMESTEP, epoch, image, 2)
    if sampler == "uniform":
        return np.float32(fraction(first))
    return np.float32(1 / (1 + math.exp(-gaussian(first, second)[0])))


def level_of(seed: int, epoch: int, image: int) -> int:
    """A DDPM's level, 0 .. 999: 1000 times the fraction of the first word, rounded down."""
    return 1000 * (2 * words(seed, TIMESTEP, epoch, image, 1)[0] + 1) >> 33


def is_dropped(seed: int, epoch: int, image: int, dropout: float) -> bool:
    """Whether the network is not told the image's class."""
    return fraction(words(seed, LABEL_DROP, epoch, image, 1)[0]) < dropout


def noise_of(seed: int, epoch: int, image: int, tokens: int, channels: int = 16) -> np.ndarray:
    """x0: float32 (tokens, channels), one draw a value, token after token."""
    drawn = gaussians(words(seed, NOISE, epoch, image, channels * tokens))
    return drawn.astype(np.float32).reshape(tokens, channels)


def initial_weight(seed: int, name: str, shape: tuple[int, ...], head_size: int) -> np.ndarray:
    """A tensor of the network, float32: matrices Xavier-uniform, the embeddings of time and class N(0, 0.02); biases,
    the output, and whatever ends an AdaLN are zero; logits start with the scale that normed q and k have."""
    if name.endswith(".attn.qk_scale"):
        return np.full(shape, math.sqrt(head_size), np.float32)
    narrows = len(shape) == 2 and shape[0] < shape[1]  # as the first factor of an AdaLN in two factors does
    if name.endswith(".bias") or name == "final_layer.linear.weight" or ("adaLN_modulation" in name and not narrows):
        return np.zeros(shape, np.float32)
    stream = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1
    rows, columns = shape
    draws = words(seed, INIT, 0, stream, rows * columns + rows * columns % 2)
    if name.startswith(("t_embedder", "y_embedder")):
        values = 0.02 * gaussians(draws)
    else:
        values = math.sqrt(6 / (rows + columns)) * (2 * np.array([fraction(word) for word in draws]) - 1)
    return values[: rows * columns].astype(np.float32).reshape(shape)
