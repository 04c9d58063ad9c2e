"""Generates images with the network: many sizes in one pack, each with its own positions, with guidance and a solver.

All random numbers of an image are keyed by (seed, index) alone, so an image depends neither on the number of ranks nor
on the other images of its pack.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_sharding.errors import UserError
from data_sharding.plan.pack_layout import PackLayout, PackShape, lay_out
from data_sharding.plan.partition import partition
from data_sharding.rng import Purpose
from fitv2_scale.config.model import ModelConfig, RopeConfig
from fitv2_scale.config.sections import SamplingConfig
from fitv2_scale.evaluate.sampling.solvers import Images, Velocity, dopri5, euler, heun, sde
from fitv2_scale.model.extrapolation import default_rope
from fitv2_scale.model.noise import noise_words
from fitv2_scale.model.packed_batch import to_device
from fitv2_scale.model.positions import Extrapolation, positions_of
from fitv2_scale.model.rng import normal
from fitv2_scale.model.to_torch import packing_to_torch
from fitv2_scale.parallel.failures import BrokenOff
from fitv2_scale.parallel.world import World

Network = Callable[..., Tensor]


@dataclass(frozen=True)
class ImageRequest:
    index: int  # of the image; keys its noise
    label: int
    rows: int  # in tokens
    columns: int
    positions: Extrapolation | None = None  # None: by the config's section ``sampling``

    @property
    def tokens(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Sample:
    tokens: np.ndarray  # (rows, columns, C) float32: the latent at t = 1
    nfe: int  # evaluations of the velocity for this image; with guidance each is two passes through the network


@torch.no_grad()
def sample(
    network: Network,
    requests: list[ImageRequest],
    *,
    model: ModelConfig,
    sampling: SamplingConfig,
    seed: int,
    world: World,
    tensor: int = 1,
    gather: bool = True,
    between: Callable[[], None] = lambda: None,
) -> dict[ImageRequest, Sample]:
    """The sample of each request; without ``gather`` only of the requests of this rank.

    A collective: each rank generates its images in one pack, and all packs have one shape, so all ranks call the
    network alike. The ``tensor`` ranks of a tensor group compute the same pack together; without ``gather`` only the
    first of them returns its samples. Before each call of the network, ranks call ``between``, which may raise
    BrokenOff on all of them.

    Raises:
        UserError: a label that is no class of ``model``.
    """
    for request in requests:
        if not 0 <= request.label < model.classes:
            raise UserError(f"class {request.label} is out of range: the model has classes 0 to {model.classes - 1}")
    pack = _RankPack.of(requests, 1 if sampling.cfg == 1.0 else 2, world, tensor)

    def interruptible(*inputs: Any) -> Tensor:
        between()
        return network(*inputs)

    guided = _GuidedVelocity(interruptible, pack, model, sampling, world.device)
    if sampling.solver == "dopri5":
        with _lockstep(guided, world) as velocity:
            made = _solve(velocity, guided.images, pack.requests, sampling, seed, guided.channels)
    else:
        made = _solve(guided, guided.images, pack.requests, sampling, seed, guided.channels)
    if not gather:
        return made if world.rank % tensor == 0 else {}
    return {request: one for part in world.all_gather(made) for request, one in part.items()}


@dataclass(frozen=True)
class _RankPack:
    """The requests of one rank and its pack: the images, with guidance once more without class, then padding."""

    requests: list[ImageRequest]
    copies: int  # 2 with guidance
    layout: PackLayout
    slots: int

    @classmethod
    def of(cls, requests: list[ImageRequest], copies: int, world: World, tensor: int) -> "_RankPack":
        cost = np.array([r.tokens for r in requests])
        shares, longest = partition(cost, world.size // tensor), int(cost.max())
        capacity = copies * max(int(cost[s].sum()) for s in shares)
        slots = copies * max(len(s) for s in shares) + -(-capacity // longest)
        own = [requests[i] for i in shares[world.rank // tensor].tolist()]
        layout = lay_out([(r.rows, r.columns) for r in own] * copies, PackShape(capacity, slots, longest))
        return cls(own, copies, layout, slots)

    @property
    def tokens(self) -> int:
        """Tokens of its images, counted once."""
        return self.layout.tokens // self.copies


class _GuidedVelocity:
    """The guided velocity of the tokens of a rank's images, without padding: (N, C), (I,) -> (N, C) float32."""

    def __init__(
        self, network: Network, pack: _RankPack, model: ModelConfig, sampling: SamplingConfig, device: torch.device
    ):
        self._network, self._pack, self._sampling, self._device = network, pack, sampling, device
        self.channels = model.token_channels
        self._first_three = 3 * model.patch**2  # of the channels of a token, those of the first three of a latent
        self._packing = packing_to_torch(pack.layout).to(device)
        label_I = torch.full((pack.slots,), model.classes)
        label_I[: len(pack.requests)] = torch.tensor([r.label for r in pack.requests], dtype=torch.int64)
        self._label_I = to_device(label_I, device)
        own = [r.positions or positions_for_size(sampling, model, r.rows, r.columns) for r in pack.requests]
        own = own * pack.copies + [model.extrapolation] * (pack.slots - pack.copies * len(own))
        self._positions = positions_of(model, self._packing, own)

    @property
    def images(self) -> Images:
        tokens, count = self._pack.tokens, len(self._pack.requests)
        packing = self._packing
        return Images(packing.image_T[:tokens], packing.place_T[:tokens], packing.cu_seqlens_I1.diff()[:count].long())

    def __call__(self, x_NC: Tensor, t_I: Tensor) -> Tensor:
        pack, cfg, images = self._pack, self._sampling.cfg, len(self._pack.requests)
        x_TC = x_NC.new_zeros(len(self._packing.image_T), self.channels)
        t_slots = x_NC.new_zeros(pack.slots)
        for copy in range(pack.copies):
            x_TC[copy * pack.tokens : (copy + 1) * pack.tokens] = x_NC
            t_slots[copy * images : (copy + 1) * images] = t_I
        velocity_TC = self._network(x_TC, t_slots, self._label_I, self._packing, self._positions).float()
        conditional_NC = velocity_TC[: pack.tokens]
        if pack.copies == 1:
            return conditional_NC
        free_NC = velocity_TC[pack.tokens : 2 * pack.tokens]
        guided_NC = free_NC + cfg * (conditional_NC - free_NC)
        if self._sampling.guided_channels == "all":
            return guided_NC
        return torch.cat((guided_NC[:, : self._first_three], conditional_NC[:, self._first_three :]), 1)

    def idle(self) -> None:
        """Calls the network without using the result, because other ranks need to call it."""
        self(torch.zeros(self._pack.tokens, self.channels, device=self._device), torch.zeros((), device=self._device))


def positions_for_size(sampling: SamplingConfig, model: ModelConfig, rows: int, columns: int) -> Extrapolation:
    """The extrapolation that ``sampling`` asks for at a size, of the kind that ``model`` has."""
    if model.position != "sincos":
        return rope_for_size(sampling, model, rows, columns)
    return model.sincos if sampling.sincos == "auto" else model.sincos.model_copy(update={"mode": sampling.sincos})


def rope_for_size(sampling: SamplingConfig, model: ModelConfig, rows: int, columns: int) -> RopeConfig:
    """The RoPE that ``sampling`` asks for at a size; "auto" is as published."""
    chosen, asked = default_rope(model.rope, rows, columns), {}
    if sampling.rope != "auto":
        asked["mode"], asked["attention_scale"] = sampling.rope, "none"
    if sampling.attention_scale != "auto":
        asked["attention_scale"] = sampling.attention_scale
    return chosen.model_copy(update=asked)


def _solve(
    velocity: Velocity, images: Images, requests: list[ImageRequest], sampling: SamplingConfig, seed: int, channels: int
) -> dict[ImageRequest, Sample]:
    device = images.image_N.device
    index_I = torch.tensor([r.index for r in requests], dtype=torch.int64, device=device)

    def noise(draw: int) -> Tensor:
        words = noise_words(Purpose.SAMPLER_NOISE, seed, draw, index_I[images.image_N], images.place_N, channels)
        return normal(words).float()

    x_NC, nfe_I = noise(0), images.count(0)
    match sampling.solver:
        case "euler":
            x_NC, nfe_I = euler(velocity, x_NC, images, sampling.steps)
        case "heun":
            x_NC, nfe_I = heun(velocity, x_NC, images, sampling.steps)
        case "sde":
            x_NC, nfe_I = sde(velocity, x_NC, images, sampling.steps, lambda k: noise(k + 1))
        case "dopri5":
            if requests:
                x_NC, nfe_I = dopri5(velocity, x_NC, images, sampling.atol, sampling.rtol)
    made, at, x = {}, 0, x_NC.cpu().numpy()
    for r, nfe in zip(requests, nfe_I.tolist(), strict=True):
        made[r] = Sample(x[at : at + r.tokens].reshape(r.rows, r.columns, channels), nfe)
        at += r.tokens
    return made


@contextmanager
def _lockstep(guided: _GuidedVelocity, world: World) -> Generator[Velocity]:
    """For ranks that need different numbers of network calls, but must call it equally often, since every rank holds a
    part of it: a rank that is done, or has failed, continues to call until all are done. BrokenOff comes on all of them
    in the same call."""

    def any_working(working: int) -> bool:
        return world.size > 1 and world.all_reduce_sum(torch.tensor([working])).item() > 0

    def velocity(x_NC: Tensor, t_I: Tensor) -> Tensor:
        any_working(1)
        return guided(x_NC, t_I)

    alone = True
    try:
        yield velocity
    except BrokenOff:
        alone = False
        raise
    finally:
        while alone and any_working(0):
            guided.idle()
