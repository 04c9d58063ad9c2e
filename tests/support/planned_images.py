"""The images of a run's steps, as its plan chooses them and its dataset holds them."""

from collections.abc import Callable
from functools import cache

from data_sharding.plan.view_sizes import CROP
from data_sharding.stream.frames import read_frame
from data_sharding.stream.substitutes import frame_of
from fitv2_scale.config.schema import Config
from fitv2_scale.data import Data
from tests.oracle.patches import latent_of, tokens_of
from tests.oracle.training import Image


def planned_images(config: Config) -> Callable[[int], list[Image]]:
    """``images(step)`` of a run with ``config``, with the steps counted from 0."""
    plan = Data.open(config, (1,)).plan
    frame = cache(lambda dataset, f: read_frame(plan.manifests[dataset], f))

    def image(dataset: int, epoch: int, row: int, number: int, label: int, view: int, flip: int, tokens: int) -> Image:
        manifest = plan.manifests[dataset]
        f = frame_of(manifest, row)
        sample = frame(dataset, f)[row - int(manifest.frame_first[f])]
        latents = sample.views["crop" if view == CROP else "resize"][flip]
        if config.model.patch != 2:
            latents = tokens_of(latent_of(latents), config.model.patch)
        assert latents.shape[0] * latents.shape[1] == tokens and sample.label == label
        return Image(epoch, number, label, latents)

    @cache
    def images(step: int) -> list[Image]:
        columns = vars(plan.step(step)).values()
        return [image(*map(int, values)) for values in zip(*columns, strict=True)]

    return images
