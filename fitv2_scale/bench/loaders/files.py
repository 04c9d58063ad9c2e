"""One file an image, as FiTv2 was released: a map-style dataset over the folders of published latents (the layout of
``data_sharding.write.published_latents``), a random view and flip at each access, padded, default collation.

Two differences, both in its favour: float16 instead of float32 in the files, and on S3, which the released code does
not know, one GET an image over a connection that each worker keeps.
"""

import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load, load_file, save_file
from torch.utils.data import DataLoader, Dataset

from data_sharding.format.shard import Sample
from fitv2_scale.bench.loaders import Batch, Source, padded, s3, seen

_ENDING = ".safetensors"


class _Latents(Dataset):
    def __init__(self, source: Source):
        self._source = source
        folder = f"{source.url}/"
        if source.is_s3:
            files = s3.list_urls(source.url, _ENDING)
        else:
            files = sorted(map(str, Path(source.url).rglob(f"*{_ENDING}")))
        self._files: dict[str, dict[str, str]] = {}  # name -> view -> file
        for file in files:
            group, _, name = file.removeprefix(folder).partition("/")
            self._files.setdefault(name, {})["crop" if group.endswith("_crop") else "resize"] = file
        self._names = sorted(self._files)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, at: int) -> dict:
        files = self._files[self._names[at]]
        view = "crop" if self._source.views == "mixed" and "crop" in files and random.random() < 0.5 else "resize"
        tensors = load(s3.get(files[view]).read()) if self._source.is_s3 else load_file(files[view])
        sample_id = int(self._names[at].removesuffix(_ENDING), 16)
        return padded(sample_id, int(tensors["label"]), {"resize": tensors["feature"]}, self._source, random)


def write(samples: Iterable[Sample], folder: Path) -> None:
    for sample in samples:
        for view, feature in sample.views.items():
            _, h, w, _ = feature.shape
            group = f"greater_than_256_{view}" if "crop" in sample.views else "from_16_to_256"
            (folder / group).mkdir(exist_ok=True)
            row, column = np.mgrid[:h, :w].reshape(2, -1)
            tensors = {
                "feature": feature,
                "grid": np.stack((column, row)),
                "size": np.array((h, w)),
                "label": np.array(sample.label),
            }
            save_file(tensors, folder / group / f"{sample.id:016x}{_ENDING}")


def epochs(source: Source) -> Iterator[Iterator[Batch]]:
    loader = DataLoader(
        _Latents(source),
        batch_size=source.batch,
        shuffle=True,
        num_workers=source.workers,
        persistent_workers=source.workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
    while True:
        yield map(seen, loader)
