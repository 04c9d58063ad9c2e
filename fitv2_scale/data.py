"""The data of a run: the plan, and how its steps are distributed over ranks and packs."""

from dataclasses import dataclass, replace

from data_sharding.errors import UserError
from data_sharding.format.class_names import check_same_classes
from data_sharding.format.codec import Codec
from data_sharding.format.codecs import codec_of
from data_sharding.format.manifest import Manifest
from data_sharding.plan.balance import Cost, Nodes
from data_sharding.plan.pack_layout import PackShape
from data_sharding.plan.pack_shapes import shapes_for_plan
from data_sharding.plan.plan import MAX_WINDOW_STEPS, Cursor, Plan, Segment
from data_sharding.plan.size_presets import is_preset, open_preset
from data_sharding.plan.token_grid import TokenGrid
from data_sharding.plan.view_sizes import require_a_token
from data_sharding.rng import MAX_EPOCH
from fitv2_scale.config.schema import Config

# Weights are whole numbers of a unit: the plan is integer arithmetic. The second one is for datasets of which the
# first would make nothing.
_WEIGHT_UNITS = (1_000_000, 1_000_000_000_000)
_AHEAD = 5 * MAX_WINDOW_STEPS  # steps beyond the last that may be planned: whole windows, some to choose shapes from


@dataclass(frozen=True)
class Data:
    """The plan of a run, and what divides its steps among ranks and packs (``plan.balance``)."""

    plan: Plan
    cost: Cost
    nodes: Nodes  # data-parallel ranks per node, or all as one node if every node holds all data
    shapes: dict[int, tuple[PackShape, ...]]  # by segment of the plan (see ``plan.pack_shapes``)

    @classmethod
    def open(cls, config: Config, nodes: Nodes) -> "Data":
        """``nodes``: data-parallel ranks of each node. Raises UserError if a dataset does not exist, or does not fit
        the model, the batch or the ranks."""
        cache = config.data.cache_dir
        manifests = [open_preset(url) if is_preset(url) else Manifest.load(url, cache) for url in config.data.urls]
        for manifest in manifests:
            _check(manifest, manifests[0], config)
        token_grid = TokenGrid(config.model.patch, config.model.latent_channels)
        for manifest in manifests:
            require_a_token(manifest, config.data.views, token_grid)
        plan = Plan(manifests, config.seed, config.data.views, [_segment(config, manifests)], token_grid)
        _check_epochs(plan, config, 0, [0] * len(manifests))
        cost = Cost.transformer(config.model.hidden)
        if _fits_a_node(manifests, config):
            nodes = (sum(nodes),)  # each node caches all of it: only balance matters
        return cls(plan, cost, nodes, _shapes(plan, cost, nodes, config, 0))

    def continued(self, cursor: Cursor, step: int, config: Config) -> tuple["Data", list[str]]:
        """The data from ``step`` on of a run that is at ``cursor``, and notes for the user.

        Raises:
            UserError: the run was trained on other data, or in another order.
        """
        if cursor.plan_hash != self.plan.hash:
            raise UserError(
                f"{config.run} was trained on other data or in another order: restore data.url, or "
                "start a new run from it with --fork-from"
            )
        wanted = self.plan.schedule[0]
        plan = self.plan.continued(cursor, step, wanted)
        _check_epochs(plan, config, step, cursor.images)
        if plan.schedule == self.plan.schedule:
            return self, []
        notes, last = [], plan.schedule[-1]
        if last.start >= step and len(plan.schedule) > 1:
            notes = [f"from step {last.start}, the next window boundary: {last.images} images per step"]
            if len(last.weights) > 1:
                notes[0] += f", fractions of the datasets {[round(w / sum(last.weights), 4) for w in last.weights]}"
        shapes = _shapes(plan, self.cost, self.nodes, config, step)
        return replace(self, plan=plan, shapes=shapes), notes

    def codec(self, config: Config) -> Codec:
        """The codec that decodes the latents. Raises UserError if it is missing, or not the VAE of the latents."""
        return codec_of(self.plan.manifests[0].header.codec, config.sampling.vae)

    def notes(self, config: Config) -> list[str]:
        """What the user should know of a network with ``config`` that trains on these images."""
        side, longest = config.model.sincos.train_side, max(s.max_seqlen for each in self.shapes.values() for s in each)
        if config.model.position != "sincos" or (fitting := round(longest**0.5)) == side:
            return []
        return [
            f"model.sincos.train_side is {side}, and the longest image has {longest} tokens: positions in other sizes "
            "(EI, PI) and an exported table will be of another square; of the data it is "
            f"model.sincos.train_side={fitting}"
        ]

    @property
    def classes(self) -> int:
        return len(self.plan.manifests[0].classes)  # all have the same


def _shapes(plan: Plan, cost: Cost, nodes: Nodes, config: Config, step: int) -> dict[int, tuple[PackShape, ...]]:
    layout = config.layout
    return shapes_for_plan(plan, cost, nodes, layout.max_tokens, step, layout.pad_to_multiple_of)


def _check(manifest: Manifest, first: Manifest, config: Config) -> None:
    if len(manifest.classes) > config.model.classes:
        raise UserError(
            f"{manifest.url} has {len(manifest.classes)} classes, the model only {config.model.classes}: "
            f"set model.classes={len(manifest.classes)} or more"
        )
    if is_preset(manifest.url) or is_preset(first.url):
        return
    if (channels := manifest.header.latent_channels) != config.model.latent_channels:
        raise UserError(
            f"{manifest.url} holds latents of {channels} channels, and the model takes {config.model.latent_channels}: "
            f"set model.latent_channels={channels}, or give another dataset"
        )
    check_same_classes(manifest.url, manifest.classes, first.url, first.classes)
    if manifest.header.codec["digest"] != first.header.codec["digest"]:
        raise UserError(f"{manifest.url} and {first.url} were written with different codecs: write one of them again")


def _fits_a_node(manifests: list[Manifest], config: Config) -> bool:
    """Whether the disk cache of a node has room for all shards."""
    stored = sum(manifest.header.totals.get("bytes", 0) for manifest in manifests)
    return bool(config.data.cache_dir) and stored <= config.data.cache_disk_gib * 2**30


def _segment(config: Config, manifests: list[Manifest]) -> Segment:
    """Raises UserError for weights that do not suit the datasets."""
    given = config.data.weights
    if given is not None and (len(given) != len(manifests) or min(given) < 0 or not any(given)):
        raise UserError(
            f"data.weights are {given}: give one for each of the {len(manifests)} datasets, none below 0 and not all 0"
        )
    weights = given or [len(m.sample_id) for m in manifests]
    total = sum(weights) or 1
    lost = 0
    for unit in _WEIGHT_UNITS:
        shares = tuple(round(weight / total * unit) for weight in weights)
        if all(share > 0 for weight, share in zip(weights, shares, strict=True) if weight):
            return Segment(0, config.batch.images, shares)
        lost = next(i for i, weight in enumerate(weights) if weight and not shares[i])
    raise UserError(
        f"data.weights give {config.data.urls[lost]} less than one image of {_WEIGHT_UNITS[-1]:,}, so it is never "
        "read: raise its weight, or leave it out"
    )


def _check_epochs(plan: Plan, config: Config, done: int, taken: list[int]) -> None:
    """Raises UserError if the steps from ``done`` on, at which the datasets have given ``taken`` images, need an epoch
    that has no random numbers of its own."""
    segment = plan.schedule[-1]
    left = (config.train.steps - done + _AHEAD) * segment.images
    for manifest, samples, weight, before in zip(plan.manifests, plan.samples, segment.weights, taken, strict=True):
        if before + left * weight // sum(segment.weights) >= MAX_EPOCH * samples > 0:
            raise UserError(
                f"train.steps={config.train.steps} with {segment.images} images a step are more than {MAX_EPOCH:,} "
                f"epochs of the {samples} images of {manifest.url}, for which there are no random numbers: lower "
                "train.steps or batch.images, give that dataset a lower weight, or write it with more images"
            )
