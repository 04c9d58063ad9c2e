"""Counter-based random numbers: each draw of a run is a pure function of (seed, purpose, epoch, id, index).

There is no generator state to save or to broadcast to ranks. The integers are Philox4x32-10 (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", SC'11); the layout of key and counter is fixed here, for this NumPy backend and
for the torch backend in ``fitv2_scale/model/rng.py``, which gives the same integers on CPU and CUDA:

    key     = (seed low word, seed high word)
    counter = (index // 4, id low word, id high word, purpose << 24 | epoch)

Block ``index // 4`` yields four words, of which draw ``index`` is word ``index % 4``. Distinct (purpose, epoch, id,
index) are distinct counters, so nothing collides: seeds are never added to epochs.
"""

from collections.abc import Callable
from enum import IntEnum

import numpy as np

MAX_EPOCH = 1 << 24
MAX_ID = 1 << 63  # ids also live in torch.int64
_CHUNK = 1 << 14

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = np.uint64(0xFFFFFFFF)
_2, _3, _32 = np.uint64(2), np.uint64(3), np.uint64(32)


class Purpose(IntEnum):
    """The use of a draw. The numbers are part of a run's definition: never reuse or renumber one."""

    NOISE = 1  # x0 of a training image, one draw a value, in token order
    TIMESTEP = 2
    LABEL_DROP = 3
    FLIP = 4
    VIEW = 5
    FRAME_ORDER = 6  # the epoch's permutation of frames
    SAMPLE_ORDER = 7  # the shuffle inside a window
    STEP_ORDER = 8  # the order of a window's steps
    INIT = 9  # weights; the id is a hash of the tensor's name
    SAMPLER_NOISE = 10  # x0 of a generated image; the id is the image's index
    HOLDOUT = 11
    DATA_ID = 12  # hashed ids summed by the online accounting
    POSTERIOR = 13  # sampled VAE latents; the epoch is 2 * view + flip, one draw a value, in (c, h, w) order
    SUBSTITUTE = 14  # candidates for an image that cannot be read; the epoch is 2 * draw + view
    PRESET = 15  # sizes of the presets' images
    VALIDATION_ORDER = 16  # the selection of held-out images
    VALIDATION_NOISE = 17  # x0 of a held-out image; the epoch is the index of the time
    SAMPLER_LABEL = 18  # class of a generated image; the id is its index


def philox(key: tuple, counter: tuple) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Philox4x32-10. ``key`` is two and ``counter`` four broadcastable uint64 arrays or ints of 32-bit words.

    Returns four uint64 arrays of 32-bit words, in the broadcast shape.
    """
    k0, k1 = (int(k) for k in key)
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(c, np.uint64) for c in counter))
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1  # at most 64 bits each, exact in uint64
        c0, c1, c2, c3 = (
            (p1 >> _32) ^ c1 ^ np.uint64(k0),
            p1 & _MASK,
            (p0 >> _32) ^ c3 ^ np.uint64(k1),
            p0 & _MASK,
        )
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return c0, c1, c2, c3


def check_seed(seed: int) -> int:
    """The seed. Raises ValueError if it does not fit in 64 bits."""
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must lie in 0 .. 2**64 - 1, not {seed}")
    return seed


def words(seed: int, purpose: Purpose, epoch, ids, index=0) -> np.ndarray:
    """The 32-bit draw ``index`` of each (epoch, id): uint32 in the broadcast shape of ``epoch``, ``ids``, ``index``."""
    return _by_chunks(
        lambda epoch, ids, index: np.choose(
            (index & _3).astype(np.int64), _block(seed, purpose, epoch, ids, index >> _2)
        ),
        *(np.uint32, epoch, ids, index),
    )


def words64(seed: int, purpose: Purpose, epoch, ids) -> np.ndarray:
    """A 64-bit draw for each (epoch, id), made of draws 0 (low) and 1 (high): uint64."""

    def draw(epoch: np.ndarray, ids: np.ndarray) -> np.ndarray:
        w0, w1, _, _ = _block(seed, purpose, epoch, ids, 0)
        return w0 | (w1 << _32)

    return _by_chunks(draw, np.uint64, epoch, ids)


def uniform(seed: int, purpose: Purpose, epoch, ids, index=0) -> np.ndarray:
    """Float64 in [0, 1), of 32 random bits."""
    return words(seed, purpose, epoch, ids, index) * 2.0**-32


def keyed_order(seed: int, purpose: Purpose, epoch: int, ids) -> np.ndarray:
    """A random permutation: int64 positions that sort ``ids`` by their 64-bit draws (ties by position)."""
    return np.argsort(words64(seed, purpose, epoch, ids), kind="stable")


def _by_chunks(draw: Callable[..., np.ndarray], dtype: type, *counters) -> np.ndarray:
    """``draw`` of the broadcast ``counters``, some at a time: the generator needs twelve times the memory of its draws,
    and is four times as fast when that stays in the processor's cache."""
    arrays = np.broadcast_arrays(*(np.asarray(counter, np.uint64) for counter in counters))
    flat, out = [array.reshape(-1) for array in arrays], np.empty(arrays[0].size, dtype)
    for start in range(0, len(out), _CHUNK):
        part = slice(start, start + _CHUNK)
        out[part] = draw(*(array[part] for array in flat))
    return out.reshape(arrays[0].shape)[()]


def _block(seed: int, purpose: Purpose, epoch, ids, block):
    check_seed(seed)
    epoch, ids = np.asarray(epoch, np.uint64), np.asarray(ids, np.uint64)
    assert epoch.size == 0 or int(epoch.max()) < MAX_EPOCH, "epoch exceeds its 24 bits"
    tag = (np.uint64(int(purpose)) << np.uint64(24)) | epoch
    return philox((seed & 0xFFFFFFFF, seed >> 32), (block, ids & _MASK, ids >> _32, tag))
