"""mosaicml-streaming as in its documentation: MDS shards of the default size, uncompressed (compression does not help
float16 latents), StreamingDataset with the default shuffle and predownload, StreamingDataLoader with persistent
workers."""

from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

import numpy as np
from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
from streaming.base.util import clean_stale_shared_memory

from data_sharding.format.shard import Sample
from fitv2_scale.bench.loaders import Batch, LoaderConfig, endless_epochs, padded_sample, worker_options

_COLUMNS = {"id": "int", "label": "int", "resize": "ndarray:float16", "crop": "ndarray:float16"}
_NONE = np.zeros(1, np.float16)  # for a missing view, since a column can be neither left out nor empty


class _Latents(StreamingDataset):
    def __init__(self, config: LoaderConfig, **options):
        super().__init__(batch_size=config.batch, shuffle=True, **options)
        self._config = config

    def __getitem__(self, at: int) -> dict:
        row = super().__getitem__(at)
        arrays = {view: row[view] for view in ("resize", "crop") if row[view].ndim == 4}
        return padded_sample(row["id"], row["label"], arrays, self._config)


def write(samples: Iterable[Sample], folder: Path) -> None:
    with MDSWriter(out=str(folder), columns=_COLUMNS) as writer:
        for sample in samples:
            views = {view: sample.views.get(view, _NONE) for view in ("resize", "crop")}
            writer.write({"id": sample.id, "label": sample.label, **views})


def epochs(config: LoaderConfig) -> Generator[Iterator[Batch]]:
    clean_stale_shared_memory()  # of a run that was killed
    where = {"remote": config.url, "local": config.scratch} if config.is_s3 else {"local": config.url}
    dataset = _Latents(config, **where)
    for stream in dataset.streams:
        # Forked workers would share the connection that fetched the index, and mix up the bytes of shards (0.13.0).
        stream._downloader.clean_up()
    return endless_epochs(StreamingDataLoader(dataset, batch_size=config.batch, **worker_options(config)))
