"""Features of images, and their files.

A features file is an .npz of float arrays with one row per image: ``pool`` (N, D), and if the network has them
``spatial`` (N, S) and ``probabilities`` (N, K). With the Inception network of ADM's evaluator D is 2048 (pool_3), S is
2023 (mixed_6/conv, the first 7 channels of 17 x 17, channels fastest) and K is 1008 (softmax of the logits without
their bias).
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from data_sharding.errors import UserError
from data_sharding.storage.filesystems import refuse_pipe


@dataclass(frozen=True, eq=False)
class Features:
    """float32 (N, D), (N, S) or None, (N, K) or None."""

    pool: np.ndarray
    spatial: np.ndarray | None = None
    probabilities: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.pool)

    def __getitem__(self, rows: np.ndarray | slice) -> "Features":
        return Features(**{name: array[rows] for name, array in self.arrays().items()})

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that are not None, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: array for name, array in named.items() if array is not None}

    @classmethod
    def joined(cls, parts: Sequence["Features"]) -> "Features":
        return cls(**{name: np.concatenate([p.arrays()[name] for p in parts]) for name in parts[0].arrays()})

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], where: str) -> "Features":
        """Raises UserError unless the arrays are as the module's docstring says. ``where`` names them."""
        found = {field.name: arrays[field.name] for field in fields(cls) if field.name in arrays}
        for name, array in found.items():
            if array.ndim != 2 or array.dtype.kind != "f":
                raise UserError(f"{where}: {name} is {array.dtype}{list(array.shape)}, not floats [images, features]")
            if len(array) != len(found["pool"]):
                raise UserError(f"{where}: {name} has {len(array)} rows, but pool has {len(found['pool'])}")
        return cls(**found)


def is_npz(url: str) -> bool:
    """Whether it names an .npz; a folder may be called so, too. Raises UserError for a pipe, which cannot be one."""
    named = url.endswith(".npz") and not Path(url).is_dir()
    if named:
        refuse_pipe(url)
    return named


def read_npz(data: bytes | str, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of an .npz, given as a path or as bytes; with ``names`` only those of them that exist. Nothing is
    unpickled. Raises UserError."""
    where = data if isinstance(data, str) else "an .npz of this run"
    try:
        with np.load(data if isinstance(data, str) else io.BytesIO(data), allow_pickle=False) as opened:
            arrays = {name: opened[name] for name in opened.files if names is None or name in names}
            # A member that is no .npy file comes as its bytes.
            if wrong := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
                raise ValueError(f"{wrong[0]} is no array")
            return arrays
    except FileNotFoundError:
        raise UserError(f"there is no file {where}") from None
    except Exception as error:  # zipfile and numpy pass on whatever a damaged file makes them raise
        raise UserError(f"{where} is not an intact .npz of plain arrays ({error}): get it again") from error


def npz_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    out = io.BytesIO()
    # An argument allow_pickle, which the annotation has and NumPy 1 has not, would be taken for an array there.
    np.savez(out, **arrays)  # pyrefly: ignore[bad-argument-type]
    return out.getvalue()
