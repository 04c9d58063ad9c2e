"""WebDataset as its README and its ImageNet example use it: shards shuffled, a buffer of 1,000 samples shuffled,
batches made in the workers. Not mixed between the workers again, which is optional and would slow it down.

On S3, a gopen handler with a client that keeps its connection, as its FAQ recommends over a pipe from a command, and
its cache of whole shards.
"""

import random
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
import webdataset as wds

from data_sharding.format.shard import Sample
from fitv2_scale.bench.loaders import Batch, Source, padded, s3, seen

_SHARDS = 16  # a multiple of the workers of any small machine, else some would have less to do
_SHUFFLE = 1000


def write(samples: Iterable[Sample], folder: Path) -> None:
    writers = [wds.TarWriter(str(folder / f"train-{i:06d}.tar")) for i in range(_SHARDS)]
    for n, sample in enumerate(samples):
        arrays = {f"{view}.npy": array for view, array in sample.views.items()}
        writers[n % _SHARDS].write({"__key__": f"{sample.id:016x}", "cls": sample.label, **arrays})
    for writer in writers:
        writer.close()


def epochs(source: Source) -> Iterator[Iterator[Batch]]:
    if source.is_s3:
        wds.gopen_schemes["s3"] = lambda url, *args, **kw: s3.get(url)
        urls, cache = s3.list_urls(source.url, ".tar"), source.scratch
    else:
        urls, cache = sorted(map(str, Path(source.url).glob("*.tar"))), None
    dataset = wds.WebDataset(urls, shardshuffle=100, cache_dir=cache).shuffle(_SHUFFLE).decode()
    dataset = dataset.map(partial(_padded, source=source)).batched(source.batch)
    loader = wds.WebLoader(
        dataset,
        batch_size=None,
        num_workers=source.workers,
        persistent_workers=source.workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
    while True:
        yield map(seen, loader)


def _padded(sample: dict, source: Source) -> dict:
    arrays = {view: sample[f"{view}.npy"] for view in ("resize", "crop") if f"{view}.npy" in sample}
    return padded(int(sample["__key__"], 16), sample["cls"], arrays, source, random)
