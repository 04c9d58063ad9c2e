"""The ways of loading latents that `fitv2 bench data --against` compares: each writes the same samples in its own
format and reads them back as its own documentation recommends, up to tensors that a model could take."""

import importlib
import importlib.metadata
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from data_sharding.format.shard import Sample

OURS = "fitv2"
PEERS = {  # module here -> the distribution it needs, if any
    "webdataset": "webdataset",
    "streaming": "mosaicml-streaming",
    "files": None,
}


class Batch(NamedTuple):
    """What reaches the consumer at once."""

    latents: Tensor  # float32, padding included
    sample_id: Tensor  # int64, one an image
    tokens: int  # valid ones


@dataclass(frozen=True)
class Source:
    """``url`` is the folder of this way's data, local or s3://; ``scratch`` an empty local folder for caches."""

    url: str
    scratch: str
    batch: int
    workers: int
    views: Literal["mixed", "resize"]
    max_tokens: int

    @property
    def is_s3(self) -> bool:
        return self.url.startswith("s3://")


class Way(Protocol):
    """A module of this package."""

    def write(self, samples: Iterable[Sample], folder: Path) -> None:
        """All samples in this way's format. Raises nothing of its own."""

    def epochs(self, source: Source) -> Iterator[Iterator[Batch]]:
        """One epoch after the other, without end; each gives every image once, in a new order."""


def load_way(name: str) -> Way:
    return importlib.import_module(f"{__name__}.{name}")


def absent(name: str) -> str | None:
    """The distribution that this way lacks here."""
    wanted = PEERS.get(name)
    try:
        if wanted:
            importlib.metadata.version(wanted)
    except importlib.metadata.PackageNotFoundError:
        return wanted
    return None


def padded(
    sample_id: int, label: int, arrays: dict[str, np.ndarray], source: Source, rng: random.Random
) -> dict[str, Tensor]:
    """What FiT's dataset hands over: a random view and flip of float16 (2, h, w, 16), padded to ``max_tokens``."""
    view = "crop" if source.views == "mixed" and "crop" in arrays and rng.random() < 0.5 else "resize"
    array = arrays[view][rng.randrange(2)]
    h, w = array.shape[:2]
    n, most = h * w, source.max_tokens
    latents, grid = torch.zeros(most, 16), torch.zeros(2, most, dtype=torch.int64)
    latents[:n] = torch.from_numpy(array.reshape(n, 16))
    grid[:, :n] = _grid(h, w)
    mask = torch.zeros(most, dtype=torch.uint8)
    mask[:n] = 1
    return {
        "latents": latents,
        "grid": grid,
        "mask": mask,
        "size": torch.tensor((h, w)),
        "label": torch.tensor(label),
        "sample_id": torch.tensor(sample_id),
    }


@lru_cache(maxsize=4096)
def _grid(h: int, w: int) -> Tensor:
    """int64 (2, h * w): column and row."""
    return torch.stack((torch.arange(w).repeat(h), torch.arange(h).repeat_interleave(w)))


def seen(batch: dict[str, Tensor]) -> Batch:
    """A collated batch of ``padded``."""
    return Batch(batch["latents"], batch["sample_id"], int(batch["mask"].sum()))
