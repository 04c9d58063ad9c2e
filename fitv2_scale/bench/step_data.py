"""The steps that `fitv2 bench step` trains on: those of a dataset, or random latents with the sizes of a preset."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager

import numpy as np

from data_sharding.format.patches import stored_channels
from data_sharding.format.stored_array import DTYPE
from data_sharding.plan.balance import assign_packs
from data_sharding.plan.size_presets import is_preset
from data_sharding.stream.batch import StepBatch, make_batch
from data_sharding.stream.loader import Loader
from fitv2_scale.config.schema import Config
from fitv2_scale.data import Data


@contextmanager
def open_steps(config: Config, data: Data, rank: int, steps: int) -> Generator[Iterator[StepBatch]]:
    """The first ``steps`` steps of data rank ``rank``: prefetched as in training, or for a preset drawn before."""
    if any(is_preset(url) for url in config.data.urls):
        yield iter([_draw(data, rank, step) for step in range(steps)])
        return
    cache, ahead = (int(gib * 2**30) for gib in (config.data.cache_gib, config.data.prefetch_gib))
    with Loader(
        data.plan, data.cost, data.shapes, rank, data.nodes, range(steps), cache, prefetch_bytes=ahead
    ) as loader:
        yield loader


def _draw(data: Data, rank: int, step: int) -> StepBatch:
    token_grid = data.plan.token_grid
    channels = stored_channels(token_grid.latent_channels)
    images = data.plan.step(step)
    assignment = assign_packs(images.tokens, data.cost, data.nodes, data.shapes[0])
    arrays = {}
    for i in np.concatenate(assignment.packs_of(rank)).tolist():
        rows, columns = data.plan.manifests[images.dataset[i]].size[images.row[i], images.view[i]].tolist()
        latents = np.random.default_rng((step, i)).standard_normal((rows, columns, channels), np.float32)
        arrays[i] = np.broadcast_to(latents.astype(DTYPE), (2, *latents.shape))  # both flips
    return make_batch(step, images, assignment, data.cost, rank, arrays, 0, token_grid)
