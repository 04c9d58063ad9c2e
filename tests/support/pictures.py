"""Pictures of noise and slopes, and the files that hold them."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def file_of(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_pictures(
    root: Path, count: int, sides: tuple[int, int], folders: Sequence[str], seed: int = 0, steepest: float = 2.0
) -> None:
    """``count`` PNGs, each side of some length of ``sides``, taking the folders in turn."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        height, width = rng.integers(*sides, 2)
        ramp = np.add.outer(np.arange(height), np.arange(width))[..., None] * rng.uniform(0.2, steepest, 3)
        file = root / folders[i % len(folders)] / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((ramp + rng.integers(0, 40, ramp.shape)).astype(np.uint8)).save(file)
