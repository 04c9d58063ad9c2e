"""The loaders that `fitv2 bench data --against` compares. Each module writes the same samples in its own format and
reads them as its documentation recommends, up to tensors for a model."""

import importlib
import importlib.metadata
import random
from collections.abc import Container, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from data_sharding.format.shard import Sample

OURS = "fitv2"
PEERS = {  # module -> the distribution that it needs, if any
    "webdataset": "webdataset",
    "streaming": "mosaicml-streaming",
    "files": None,
}


class Batch(NamedTuple):
    """A batch as the consumer gets it."""

    latents: Tensor  # float32, padding included
    sample_id: Tensor  # int64, one per image
    tokens: int  # without padding


@dataclass(frozen=True)
class LoaderConfig:
    """``url`` is the folder of the loader's data, local or s3://; ``scratch`` an empty local folder for caches."""

    url: str
    scratch: str
    batch: int
    workers: int
    views: Literal["mixed", "resize"]
    max_tokens: int

    @property
    def is_s3(self) -> bool:
        return self.url.startswith("s3://")


class LoaderModule(Protocol):
    """The interface of a module of this package."""

    def write(self, samples: Iterable[Sample], folder: Path) -> None:
        """Writes all samples in the loader's format. Raises nothing of its own."""

    def epochs(self, config: LoaderConfig) -> Generator[Iterator[Batch]]:
        """Epoch after epoch, without end; each gives every image once, in a new order."""


def import_loader(name: str) -> LoaderModule:
    return cast(LoaderModule, importlib.import_module(f"{__name__}.{name}"))


def missing_package(name: str) -> str | None:
    """The distribution that the loader needs and that is not installed; None if nothing is missing."""
    wanted = PEERS.get(name)
    try:
        if wanted:
            importlib.metadata.version(wanted)
    except importlib.metadata.PackageNotFoundError:
        return wanted
    return None


def padded_sample(sample_id: int, label: int, arrays: dict[str, np.ndarray], config: LoaderConfig) -> dict[str, Tensor]:
    """A sample as FiT's dataset gives it: a random view and flip of float16 (2, h, w, 16), padded to ``max_tokens``."""
    array = arrays[choose_view(arrays, config)][random.randrange(2)]
    h, w = array.shape[:2]
    n, most = h * w, config.max_tokens
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


def choose_view(views: Container[str], config: LoaderConfig) -> str:
    """The view to train on, of those that a sample has: of two, one at random if the run mixes them."""
    return "crop" if config.views == "mixed" and "crop" in views and random.random() < 0.5 else "resize"


@lru_cache(maxsize=4096)
def _grid(h: int, w: int) -> Tensor:
    """int64 (2, h * w): column and row."""
    return torch.stack((torch.arange(w).repeat(h), torch.arange(h).repeat_interleave(w)))


def worker_options(config: LoaderConfig) -> dict[str, Any]:
    """The arguments of a torch DataLoader about its worker processes."""
    return {
        "num_workers": config.workers,
        "persistent_workers": config.workers > 0,
        "pin_memory": torch.cuda.is_available(),
    }


def endless_epochs(loader: Iterable[dict[str, Tensor]]) -> Generator[Iterator[Batch]]:
    """Epoch after epoch of a loader of collated ``padded_sample``s."""
    while True:
        yield map(_collated_batch, loader)


def _collated_batch(batch: dict[str, Tensor]) -> Batch:
    return Batch(batch["latents"], batch["sample_id"], int(batch["mask"].sum()))
