"""The latents of one view as a shard has them: an .npy file of version 1.0."""

import io
from functools import lru_cache
from math import prod

import numpy as np

from data_sharding.format.patches import stored_channels

DTYPE = "float16"
ArrayShape = tuple[int, int, int, int]  # of a view: flips, h, w, channels


def stored_array(name: str, data: memoryview, latent_channels: int) -> tuple[ArrayShape, memoryview]:
    """Shape and values of a view, from the ``data`` of the member ``name``, in a dataset whose latents have so many
    channels. Raises ValueError if it is malformed."""
    channels = stored_channels(latent_channels)
    start = 10 + int.from_bytes(data[8:10], "little")  # .npy 1.0: magic, version, length of the header that follows
    shape, dtype = _npy_header(bytes(data[:start]))
    if dtype != DTYPE or len(shape) != 4 or shape[0] != 2 or shape[3] != channels:
        raise ValueError(f"{name} is {dtype}{list(shape)}, not {DTYPE}[2, h, w, {channels}]")
    if len(data) - start != prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} holds {len(data) - start} bytes of values, not those of {list(shape)}")
    return shape, data[start:]


@lru_cache(maxsize=4096)  # one entry for each shape of a view
def _npy_header(header: bytes) -> tuple[tuple[int, ...], np.dtype]:
    file = io.BytesIO(header)
    try:
        version, read = np.lib.format.read_magic(file), np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # numpy parses it as Python, and passes on what that raises
        raise ValueError(f"an array has no .npy header of version 1.0 ({error})") from error
    shape, fortran_order, dtype = read
    if version != (1, 0) or fortran_order or dtype.hasobject:
        raise ValueError("an array is not of .npy version 1.0, is in Fortran order, or holds objects")
    return shape, dtype
