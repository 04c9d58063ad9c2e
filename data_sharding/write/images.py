"""``fitv2 shard write``: images to latents. ``build.py`` writes the shards."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from data_sharding.errors import UserError
from data_sharding.format.class_names import class_digest
from data_sharding.format.codec import SD_VAE, Latent
from data_sharding.format.codecs import get_codec
from data_sharding.format.shard import Sample
from data_sharding.storage.byte_ranges import read_all
from data_sharding.storage.files import exists
from data_sharding.storage.filesystems import file_system
from data_sharding.worker_pool import cores
from data_sharding.write.begun import Options, is_finished
from data_sharding.write.build import Inputs, build, report
from data_sharding.write.entries import ImageFile, ImageSource, listed
from data_sharding.write.findings import Skipped
from data_sharding.write.image_file import UnreadableImage, decode
from data_sharding.write.image_sources import open_source
from data_sharding.write.shard_task import Made
from data_sharding.write.views import encode_views, views_of
from data_sharding.write.write_report import WriteReport


@dataclass(frozen=True)
class EncodeImages:
    """The ``Maker`` of this command. It holds the codec's name, so that each process creates its own codec."""

    codec: str
    vae: str
    latent: Latent
    max_tokens: int

    def __call__(self, entries: tuple[ImageFile, ...]) -> Iterator[Made | Skipped]:
        codec = get_codec(self.codec, self.vae, self.latent)
        pixels, views, skipped, several = {}, {}, {}, {}
        for entry, data in zip(entries, read_all(entry.data for entry in entries), strict=True):
            try:
                image, several[entry.id] = decode(data)
            except UnreadableImage as error:
                skipped[entry.id] = Skipped(entry.key, str(error))
            else:
                pixels[entry.id], views[entry.id] = (image.height, image.width), views_of(image, self.max_tokens)
        encoded = encode_views(views, codec)
        for entry in entries:
            if entry.id in skipped:
                yield skipped[entry.id]
            else:
                sample = Sample(entry.id, entry.label, encoded[entry.id])
                yield Made(sample, entry.key, pixels[entry.id], several[entry.id])


def write_dataset(
    src: str,
    dst: str,
    codec: str = "dct",
    max_tokens: int = 256,
    holdout: float = 0.0,
    workers: int | None = None,
    images_per_shard: int = 1000,
    progress: bool = True,
    vae: str = "",
    latent: Latent = "mean",
    allow_empty: bool = False,
) -> WriteReport:
    """Writes the images of ``src`` (see ``image_sources``) as a dataset at ``dst``. Continues an unfinished dataset;
    does not change a finished one.

    ``codec``, ``vae`` and ``latent`` are those of ``get_codec``. ``holdout`` sets aside round(holdout * images) images,
    chosen by key. ``workers`` is the number of processes (all cores of this job, or as many as keep its GPUs busy).
    Images that cannot be read are listed in ``dst/skipped.json``; all others are written. With ``allow_empty``, a class
    may have no image at all.

    Raises:
        UserError: bad options or source, ``dst`` was started with others, or no image could be read.
    """
    started = time.monotonic()
    src, dst = src.rstrip("/"), dst.rstrip("/")
    encoder = get_codec(codec, vae, latent)
    refuse_destination(src, dst)
    source = open_source(src)
    if source.empty and not allow_empty:
        raise _empty_classes(src, source)
    classes = class_digest(source.classes)
    options = Options(source.digest, encoder.digest, max_tokens, images_per_shard, holdout, classes)
    made = 0
    if not is_finished(dst, options):
        make = EncodeImages(codec, vae, latent, max_tokens)
        workers = _writers(codec) if workers is None else workers
        inputs = Inputs(source.entries, source.classes, source.findings)
        made = build(src, dst, options, inputs, encoder.record, make, workers, progress)
    return report(dst, made, started)


def _empty_classes(src: str, source: ImageSource) -> UserError:
    return UserError(
        f"{len(source.empty)} of the {len(source.classes)} classes in {src} hold no image ({listed(source.empty)}): "
        "each takes a label, and shifts those after it; remove what is no class, or keep all with --allow-empty"
    )


def refuse_destination(src: str, dst: str) -> None:
    """Raises UserError if ``dst`` lies inside ``src``, or is the folder of a run."""
    inner, outer = (file_system(url)[1].rstrip("/") + "/" for url in (dst, src))
    if inner.startswith(outer):
        raise UserError(f"{dst} lies inside the source {src}: choose a folder outside of it")
    if exists(f"{dst}/run.json"):
        raise UserError(f"{dst} is the folder of a run (it holds run.json): choose another folder for the dataset")


def _writers(codec: str) -> int:
    if codec != SD_VAE:
        return cores()
    from data_sharding.format.sd_vae import writers

    return writers(cores())
