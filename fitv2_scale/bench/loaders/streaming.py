"""mosaicml-streaming as its documentation uses it: MDS shards of its default size, uncompressed (float16 latents gain
nothing), StreamingDataset with its default shuffle and predownload, StreamingDataLoader with persistent workers."""

import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
from streaming.base.util import clean_stale_shared_memory

from data_sharding.format.shard import Sample
from fitv2_scale.bench.loaders import Batch, Source, padded, seen

_COLUMNS = {"id": "int", "label": "int", "resize": "ndarray:float16", "crop": "ndarray:float16"}
_NONE = np.zeros(1, np.float16)  # a column can neither be left out nor be empty


class _Latents(StreamingDataset):
    def __init__(self, source: Source, **options):
        super().__init__(batch_size=source.batch, shuffle=True, **options)
        self._source = source

    def __getitem__(self, at: int) -> dict:
        row = super().__getitem__(at)
        arrays = {view: row[view] for view in ("resize", "crop") if row[view].ndim == 4}
        return padded(row["id"], row["label"], arrays, self._source, random)


def write(samples: Iterable[Sample], folder: Path) -> None:
    with MDSWriter(out=str(folder), columns=_COLUMNS) as writer:
        for sample in samples:
            views = {view: sample.views.get(view, _NONE) for view in ("resize", "crop")}
            writer.write({"id": sample.id, "label": sample.label, **views})


def epochs(source: Source) -> Iterator[Iterator[Batch]]:
    clean_stale_shared_memory()  # of a run that was killed
    where = {"remote": source.url, "local": source.scratch} if source.is_s3 else {"local": source.url}
    dataset = _Latents(source, **where)
    for stream in dataset.streams:
        # Workers that fork would share the connection that fetched the index, and mix their shards' bytes (0.13.0).
        stream._downloader.clean_up()
    loader = StreamingDataLoader(
        dataset,
        batch_size=source.batch,
        num_workers=source.workers,
        persistent_workers=source.workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
    while True:
        yield map(seen, loader)
