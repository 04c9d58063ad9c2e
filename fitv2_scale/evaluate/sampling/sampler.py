"""Generates images with the network: many sizes in one pack, each with its own positions, with guidance and a solver.

All random numbers of an image are keyed by (seed, index) alone, so an image depends neither on the number of ranks nor
on the other images of its pack.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
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
from fitv2_scale.config.solvers import DDPM_LEVELS, require_fitting, solver_facts
from fitv2_scale.evaluate.sampling.denoising import ancestral, ddim
from fitv2_scale.evaluate.sampling.solvers import Field, Images, dopri5, euler, heun, sde
from fitv2_scale.model.extrapolation import default_rope
from fitv2_scale.model.noise import noise_words
from fitv2_scale.model.packed_batch import to_device
from fitv2_scale.model.positions import Extrapolation, positions_of
from fitv2_scale.model.rng import normal
from fitv2_scale.model.to_torch import packing_to_torch
from fitv2_scale.parallel.failures import BrokenOff
from fitv2_scale.parallel.world import World

Network = Callable[..., Tensor]
Noise = Callable[[int], Tensor]  # of a step: standard normals (N, C)

# Each takes (field, x, images, settings, noise of each step), and returns x and the NFE of each image.
SOLVE: Mapping[str, Callable[[Field, Tensor, Images, SamplingConfig, Noise], tuple[Tensor, Tensor]]] = MappingProxyType(
    {
        "euler": lambda field, x, images, s, noise: euler(field, x, images, s.steps),
        "heun": lambda field, x, images, s, noise: heun(field, x, images, s.steps),
        "dopri5": lambda field, x, images, s, noise: dopri5(field, x, images, s.atol, s.rtol),
        "sde": lambda field, x, images, s, noise: sde(field, x, images, s.steps, noise),
        "ddpm": lambda field, x, images, s, noise: ancestral(field, x, images, s.steps, noise),
        "ddim": lambda field, x, images, s, noise: ddim(field, x, images, s.steps),
    }
)


@dataclass(frozen=True)
class _Prediction:
    """What a network of an objective predicts, for guidance."""

    flow_time: Callable[[Tensor], Tensor]  # of the time that the network is given: 0 noise, 1 data; float32
    learns_variance: bool  # whether a second output means something


_PREDICTIONS: Mapping[str, _Prediction] = MappingProxyType(
    {
        "flow": _Prediction(lambda t_I: t_I, learns_variance=False),
        # In float64 first: 1 - 800 / 1000 is less than 0.2 in float32, and level 800 would miss an interval from there.
        "ddpm": _Prediction(lambda t_I: (1 - t_I.double() / DDPM_LEVELS).float(), learns_variance=True),
    }
)


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
    tokens: np.ndarray  # (rows, columns, C) float32: the latent without noise
    nfe: int  # evaluations of the field for this image; with guidance each is two passes through the network


@torch.no_grad()
def sample(
    network: Network,
    requests: list[ImageRequest],
    *,
    model: ModelConfig,
    objective: str,
    sampling: SamplingConfig,
    seed: int,
    world: World,
    tensor: int = 1,
    gather: bool = True,
    between: Callable[[], None] = lambda: None,
) -> dict[ImageRequest, Sample]:
    """The sample of each request; without ``gather`` only of the requests of this rank. ``objective`` is what the
    network was trained for, flow or ddpm.

    A collective: each rank generates its images in one pack, and all packs have one shape, so all ranks call the
    network alike. The ``tensor`` ranks of a tensor group compute the same pack together; without ``gather`` only the
    first of them returns its samples. Before each call of the network, ranks call ``between``, which may raise
    BrokenOff on all of them.

    Raises:
        UserError: a label that is no class of ``model``, or a solver for another objective.
    """
    require_fitting(sampling.solver, objective)
    for request in requests:
        if not 0 <= request.label < model.classes:
            raise UserError(f"class {request.label} is out of range: the model has classes 0 to {model.classes - 1}")
    pack = _RankPack.of(requests, 1 if sampling.cfg == 1.0 else 2, world, tensor)

    def interruptible(*inputs: Any) -> Tensor:
        between()
        return network(*inputs)

    guided = _GuidedField(interruptible, pack, model, objective, sampling, world.device)
    if solver_facts(sampling.solver).evaluations is None:
        with _lockstep(guided, world) as field:
            made = _solve(field, guided.images, pack.requests, sampling, seed, model.token_channels)
    else:
        made = _solve(guided, guided.images, pack.requests, sampling, seed, model.token_channels)
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


class _GuidedField:
    """What the network predicts for the tokens of a rank's images, without padding, with classifier-free guidance:
    (N, C), time of each image (I,) -> (N, C) float32, of a ddpm network with two outputs (N, 2 C).

    Guidance is limited to an interval of flow time as by Kynkäänniemi et al. (arXiv 2404.07724): t0 <= t < t1, and at
    t1 = 1 also t = 1; so the noisy end is inclusive, as theirs is. Elsewhere an image has the conditional prediction
    alone. So have the channels that guidance does not apply to, and the variance, which is the second of two outputs.
    """

    def __init__(
        self,
        network: Network,
        pack: _RankPack,
        model: ModelConfig,
        objective: str,
        sampling: SamplingConfig,
        device: torch.device,
    ):
        self._network, self._pack, self._sampling, self._device = network, pack, sampling, device
        self._prediction, self._channels = _PREDICTIONS[objective], model.token_channels
        self._guided = self._channels if sampling.guided_channels == "all" else 3 * model.patch**2
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
        pack, images = self._pack, len(self._pack.requests)
        x_TC = x_NC.new_zeros(len(self._packing.image_T), self._channels)
        t_slots = x_NC.new_zeros(pack.slots)
        for copy in range(pack.copies):
            x_TC[copy * pack.tokens : (copy + 1) * pack.tokens] = x_NC
            t_slots[copy * images : (copy + 1) * images] = t_I
        output_TC = self._network(x_TC, t_slots, self._label_I, self._packing, self._positions).float()
        if not self._prediction.learns_variance:
            output_TC = output_TC[:, : self._channels]
        conditional_NC = output_TC[: pack.tokens]
        if pack.copies == 1:
            return conditional_NC
        first_NC, rest_NC = conditional_NC[:, : self._guided], conditional_NC[:, self._guided :]
        free_NC = output_TC[pack.tokens : 2 * pack.tokens, : self._guided]
        guided_NC = free_NC + self._sampling.cfg * (first_NC - free_NC)
        within_N1 = self._within_interval(t_I)[self._packing.image_T[: pack.tokens], None]
        return torch.cat((torch.where(within_N1, guided_NC, first_NC), rest_NC), 1)

    def _within_interval(self, t_I: Tensor) -> Tensor:
        first, last = self._sampling.guidance_interval
        t_I = self._prediction.flow_time(t_I)
        return (t_I >= first) & ((t_I < last) if last < 1 else torch.ones_like(t_I, dtype=torch.bool))

    def idle(self) -> None:
        """Calls the network without using the result, because other ranks need to call it."""
        pack = self._pack
        self(
            torch.zeros(pack.tokens, self._channels, device=self._device),
            torch.zeros(len(pack.requests), device=self._device),
        )


def positions_for_size(sampling: SamplingConfig, model: ModelConfig, rows: int, columns: int) -> Extrapolation:
    """The extrapolation that ``sampling`` asks for at a size, of the kind that ``model`` has."""
    if model.position != "sincos":
        return rope_for_size(sampling, model, rows, columns)
    return model.sincos if sampling.sincos == "auto" else model.sincos.model_copy(update={"mode": sampling.sincos})


def rope_for_size(sampling: SamplingConfig, model: ModelConfig, rows: int, columns: int) -> RopeConfig:
    """The RoPE that ``sampling`` asks for at a size; "auto" is as published."""
    chosen, asked = default_rope(model, rows, columns), {}
    if sampling.rope != "auto":
        asked["mode"], asked["attention_scale"] = sampling.rope, "none"
    if sampling.attention_scale != "auto":
        asked["attention_scale"] = sampling.attention_scale
    return chosen.model_copy(update=asked)


def _solve(
    field: Field, images: Images, requests: list[ImageRequest], sampling: SamplingConfig, seed: int, channels: int
) -> dict[ImageRequest, Sample]:
    device = images.image_N.device
    index_I = torch.tensor([r.index for r in requests], dtype=torch.int64, device=device)

    def noise(draw: int) -> Tensor:
        words = noise_words(Purpose.SAMPLER_NOISE, seed, draw, index_I[images.image_N], images.place_N, channels)
        return normal(words).float()

    x_NC, nfe_I = noise(0), images.count(0)
    if requests or solver_facts(sampling.solver).evaluations is not None:
        x_NC, nfe_I = SOLVE[sampling.solver](field, x_NC, images, sampling, lambda k: noise(k + 1))
    made, at, x = {}, 0, x_NC.cpu().numpy()
    for r, nfe in zip(requests, nfe_I.tolist(), strict=True):
        made[r] = Sample(x[at : at + r.tokens].reshape(r.rows, r.columns, channels), nfe)
        at += r.tokens
    return made


@contextmanager
def _lockstep(guided: _GuidedField, world: World) -> Generator[Field]:
    """For ranks that need different numbers of network calls, but must call it equally often, since every rank holds a
    part of it: a rank that is done, or has failed, continues to call until all are done. BrokenOff comes on all of them
    in the same call."""

    def any_working(working: int) -> bool:
        return world.size > 1 and world.all_reduce_sum(torch.tensor([working])).item() > 0

    def field(x_NC: Tensor, t_I: Tensor) -> Tensor:
        any_working(1)
        return guided(x_NC, t_I)

    alone = True
    try:
        yield field
    except BrokenOff:
        alone = False
        raise
    finally:
        while alone and any_working(0):
            guided.idle()
