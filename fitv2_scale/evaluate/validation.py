"""Validation: the loss on a fixed grid of held-out images x times x noise.

The grid is the same in every run on the same dataset, independent of the seed, so that runs can be compared. Its times
are evenly spaced from noise to data, independent of the times of training; images are whole (the resize view), not
flipped, and have their class. Each rank keeps its part of the images in memory, and all ranks have the same number of
packs of one shape.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from data_sharding.errors import UserError
from data_sharding.format.class_names import check_same_classes
from data_sharding.format.manifest import Manifest
from data_sharding.format.shard import VIEWS
from data_sharding.plan.balance import Cost, assign_packs
from data_sharding.plan.pack_layout import PackShape
from data_sharding.plan.plan import StepSet, sample_ids
from data_sharding.plan.token_grid import STORED_TOKENS, TokenGrid
from data_sharding.plan.view_sizes import RESIZE
from data_sharding.rng import Purpose, keyed_order
from data_sharding.stream.batch import make_batch
from data_sharding.stream.frames import FrameReader
from data_sharding.stream.substitutes import frames_of
from fitv2_scale.config.layout import Layout
from fitv2_scale.config.sections import ValidationConfig
from fitv2_scale.model.objective import VALIDATION_SEED, Objective
from fitv2_scale.model.to_torch import pack_to_torch
from fitv2_scale.parallel.world import World


class Validation:
    """The validation set in memory. All ranks create it together, before they need it, so that all of them learn of an
    image that cannot be read."""

    def __init__(
        self,
        manifests: Sequence[Manifest],
        config: ValidationConfig,
        *,
        objective: Objective,
        cost: Cost,
        shape: PackShape,
        world: World,
        layout: Layout,
        token_grid: TokenGrid,
        reader: FrameReader,
    ):
        """``shape`` is the shape of its packs; ``cost`` balances the images over ranks.

        Raises:
            UserError: an image is too small for a patch or too large for a pack, or cannot be read.
        """
        self._objective, self._world, self._counts = objective, world, layout.tensor_rank(world.rank) == 0
        self._u_K = (torch.arange(config.timesteps, dtype=torch.float64, device=world.device) + 0.5) / config.timesteps
        grid = validation_grid(manifests, config, token_grid)
        self.images = len(grid.row) // config.timesteps
        if small := int((grid.tokens == 0).sum()) // config.timesteps:
            raise UserError(
                f"{small} of the {self.images} images that validation takes of {manifests[0].url} are less than one "
                f"patch of model.patch={token_grid.patch} on a side: set validation.url to a dataset with larger images"
            )
        if (longest := int(grid.tokens.max())) > shape.max_seqlen:
            raise UserError(
                f"{manifests[0].url} holds images of {longest} tokens, but packs of this run only hold images of up to "
                f"{shape.max_seqlen}: set validation.url to a dataset with a smaller --max-tokens"
            )
        rank = layout.data_rank(world.rank)
        assignment = assign_packs(grid.tokens, cost, (layout.data_parallel,), [shape])
        arrays, error = _read(manifests, grid, np.concatenate(assignment.packs_of(rank)), reader)
        world.raise_shared(error)
        self._packs = make_batch(0, grid, assignment, cost, rank, arrays, 0, token_grid).packs

    @torch.no_grad()
    def loss(self, network: Callable[..., Tensor], between: Callable[[], None] = lambda: None) -> float:
        """The mean over the grid of the loss of each image, the same on all ranks. A collective. Before each pack, of
        which all ranks have as many, it calls ``between``, which may raise BrokenOff on all ranks."""
        total = torch.zeros((), dtype=torch.float64, device=self._world.device)
        for pack in self._packs:
            between()
            batch = pack_to_torch(pack, self._world.device)
            noised = self._objective.validation_batch(batch, self._u_K[batch.epoch_I])
            total += self._objective.losses(network, noised, batch).weighted_sum(batch)
        return self._world.all_reduce_sum(total.cpu() if self._counts else torch.zeros((), dtype=torch.float64)).item()


def held_out(training: Sequence[Manifest], config: ValidationConfig) -> list[Manifest]:
    """The datasets of ``held_out_urls``. Raises UserError if there are none, or they do not match the training data."""
    found = [Manifest.load(url) for url in held_out_urls(training, config)]
    for manifest in found:
        if manifest.header.codec["digest"] != training[0].header.codec["digest"]:
            raise UserError(f"{manifest.url} was written with another codec than {training[0].url}: write it again")
        check_same_classes(manifest.url, manifest.classes, training[0].url, training[0].classes)
    return found


def held_out_urls(training: Sequence[Manifest], config: ValidationConfig) -> list[str]:
    """The datasets that ``config`` names, or else the images set aside when the training data were written. Raises
    UserError if there are none."""
    urls = config.urls or [f"{m.url}/holdout" for m in training if m.header.source.get("holdout")]
    if not urls:
        raise UserError(
            f"{training[0].url} has no images set aside for validation: write it with `--holdout 0.02`, give another "
            "dataset as validation.url, or train with validation.every_steps=0"
        )
    return [url.rstrip("/") for url in urls]


def validation_grid(
    manifests: Sequence[Manifest], config: ValidationConfig, token_grid: TokenGrid = STORED_TOKENS
) -> StepSet:
    """Every image of the grid at every time, as a StepSet; its epoch is the index of the time."""
    dataset = np.repeat(np.arange(len(manifests)), [len(m.sample_id) for m in manifests])
    row = np.concatenate([np.arange(len(m.sample_id)) for m in manifests])
    ids = np.concatenate([sample_ids(d, m.sample_id) for d, m in enumerate(manifests)])
    chosen = keyed_order(VALIDATION_SEED, Purpose.VALIDATION_ORDER, 0, ids)[: config.images]
    label = np.concatenate([m.label for m in manifests])[chosen].astype(np.int64)
    size = np.concatenate([m.size[:, RESIZE] for m in manifests])[chosen]
    columns = dataset[chosen], row[chosen], ids[chosen], label, token_grid.lengths(size)
    dataset, row, ids, label, tokens = (np.tile(column, config.timesteps) for column in columns)
    epoch, zero = np.repeat(np.arange(config.timesteps), len(chosen)), np.zeros_like(row)
    return StepSet(dataset, epoch, row, ids, label, zero + RESIZE, zero, tokens)


def _read(
    manifests: Sequence[Manifest], grid: StepSet, mine: np.ndarray, reader: FrameReader
) -> tuple[dict[int, np.ndarray], Exception | None]:
    """The latents of the images ``mine`` (indices in the grid), by index; or the error."""
    arrays: dict[int, np.ndarray] = {}
    try:
        for d, manifest in enumerate(manifests):
            places = mine[grid.dataset[mine] == d]
            for f in np.unique(frames := frames_of(manifest, grid.row[places])).tolist():
                frame = reader.read(manifest, f)
                for i in places[frames == f].tolist():
                    sample = int(grid.row[i] - manifest.frame_first[f])
                    arrays[i] = frame.view(sample, VIEWS[RESIZE]).copy()  # a view would keep the whole frame
    except Exception as error:
        return {}, error
    return arrays, None
