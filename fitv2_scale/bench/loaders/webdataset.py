"""WebDataset as in its README and its ImageNet example: shuffled shards, a shuffle buffer of 1,000 samples, batches
made in the workers. Samples are not mixed between workers again, which is optional and would slow it down.

On S3, with a gopen handler whose client keeps its connection (its FAQ prefers that to a pipe from a command), and with
its cache of whole shards.
"""

from collections.abc import Generator, Iterable, Iterator
from functools import partial
from pathlib import Path

import webdataset as wds

from data_sharding.format.shard import Sample
from fitv2_scale.bench.loaders import Batch, LoaderConfig, endless_epochs, padded_sample, s3, worker_options

_SHARDS = 16  # a multiple of the number of workers on any small machine, so that all have the same work
_SHUFFLE = 1000


def write(samples: Iterable[Sample], folder: Path) -> None:
    writers = [wds.TarWriter(str(folder / f"train-{i:06d}.tar")) for i in range(_SHARDS)]
    for n, sample in enumerate(samples):
        arrays = {f"{view}.npy": array for view, array in sample.views.items()}
        writers[n % _SHARDS].write({"__key__": f"{sample.id:016x}", "cls": sample.label, **arrays})
    for writer in writers:
        writer.close()


def epochs(config: LoaderConfig) -> Generator[Iterator[Batch]]:
    if config.is_s3:
        wds.gopen_schemes["s3"] = lambda url, *args, **kw: s3.get(url)
        urls, cache = s3.list_urls(config.url, ".tar"), config.scratch
    else:
        urls, cache = sorted(map(str, Path(config.url).glob("*.tar"))), None
    dataset = wds.WebDataset(urls, shardshuffle=100, cache_dir=cache).shuffle(_SHUFFLE).decode()
    dataset = dataset.map(partial(_padded, config=config)).batched(config.batch)
    return endless_epochs(wds.WebLoader(dataset, batch_size=None, **worker_options(config)))


def _padded(sample: dict, config: LoaderConfig) -> dict:
    arrays = {view: sample[f"{view}.npy"] for view in ("resize", "crop") if f"{view}.npy" in sample}
    return padded_sample(int(sample["__key__"], 16), sample["cls"], arrays, config)
