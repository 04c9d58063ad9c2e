"""One file per image, as in the released FiTv2: a map-style dataset over the folders of published latents (the layout
of ``data_sharding.write.published_latents``), a random view and flip at each access, padding, default collation.

There are two differences, both in its favour: float16 instead of float32 in the files, and on S3, which the released
code does not support, one GET per image over a connection that each worker keeps.
"""

from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import load, load_file, save_file
from torch.utils.data import DataLoader, Dataset

from data_sharding.format.shard import Sample
from fitv2_scale.bench.loaders import (
    Batch,
    LoaderConfig,
    choose_view,
    endless_epochs,
    padded_sample,
    s3,
    worker_options,
)

_ENDING = ".safetensors"


class _Latents(Dataset):
    def __init__(self, config: LoaderConfig):
        self._config = config
        folder = f"{config.url}/"
        if config.is_s3:
            files = s3.list_urls(config.url, _ENDING)
        else:
            files = sorted(map(str, Path(config.url).rglob(f"*{_ENDING}")))
        self._files: dict[str, dict[str, str]] = {}  # name -> view -> file
        for file in files:
            group, _, name = file.removeprefix(folder).partition("/")
            self._files.setdefault(name, {})["crop" if group.endswith("_crop") else "resize"] = file
        self._names = sorted(self._files)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict:
        files = self._files[self._names[index]]
        file = files[choose_view(files, self._config)]
        tensors = load(s3.get(file).read()) if self._config.is_s3 else load_file(file)
        sample_id = int(self._names[index].removesuffix(_ENDING), 16)
        return padded_sample(sample_id, int(tensors["label"]), {"resize": tensors["feature"]}, self._config)


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


def epochs(config: LoaderConfig) -> Generator[Iterator[Batch]]:
    return endless_epochs(DataLoader(_Latents(config), batch_size=config.batch, shuffle=True, **worker_options(config)))
