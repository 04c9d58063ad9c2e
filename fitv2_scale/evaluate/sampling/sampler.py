"""Pictures from the network: many sizes in one pack, each with its own positions, guided, by the solver asked for.

All that is random for an image is keyed by (seed, index) alone, so the pictures do not depend on how many ranks make
them, nor on what lies beside them in a pack.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_sharding.errors import UserError
from data_sharding.plan.balance import partition
from data_sharding.plan.pack_layout import PackLayout, PackShape, lay_out
from data_sharding.rng import Purpose
from fitv2_scale.config.model import TOKEN_CHANNELS, ModelConfig, RopeConfig
from fitv2_scale.config.sections import SamplingConfig
from fitv2_scale.evaluate.sampling.solvers import Images, Velocity, dopri5, euler, heun, sde
from fitv2_scale.model.extrapolation import default_rope, extrapolated_table
from fitv2_scale.model.flow import noise_words
from fitv2_scale.model.packed_batch import Packing, to_device
from fitv2_scale.model.rng import normal
from fitv2_scale.model.to_torch import packing_to_torch
from fitv2_scale.parallel.world import World

Network = Callable[..., Tensor]
_FIRST_THREE = 12  # of the 16 channels of a token: those of three of the four latent channels


@dataclass(frozen=True)
class Request:
    index: int  # of the image, which keys its noise
    label: int
    rows: int  # in tokens
    columns: int
    rope: RopeConfig | None = None  # None: what the sampling's config says

    @property
    def tokens(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Sample:
    tokens: np.ndarray  # (rows, columns, 16) float32: the latent at t = 1
    nfe: int  # evaluations of the velocity at this image; with guidance each is two passes through the network


@torch.no_grad()
def sample(
    network: Network,
    requests: list[Request],
    *,
    model: ModelConfig,
    sampling: SamplingConfig,
    seed: int,
    world: World,
    tensor: int = 1,
    gather: bool = True,
) -> dict[Request, Sample]:
    """The sample of each request; without ``gather`` only of those that this rank made.

    A collective: each rank makes its share in one pack, all packs of one shape, so that all call the network alike.
    The ``tensor`` ranks of a tensor group make the same share together; without ``gather`` the first of them has it.

    Raises:
        UserError: a label that is no class of ``model``.
    """
    for request in requests:
        if not 0 <= request.label < model.classes:
            raise UserError(f"class {request.label} is out of range: the model has classes 0 to {model.classes - 1}")
    share = _Share.of(requests, 1 if sampling.cfg == 1.0 else 2, world, tensor)
    field = _Field(network, share, model, sampling, world.device)
    if sampling.solver == "dopri5":
        with _lockstep(field, world) as velocity:
            made = _solve(velocity, field.images, share.mine, sampling, seed)
    else:
        made = _solve(field, field.images, share.mine, sampling, seed)
    if not gather:
        return made if world.rank % tensor == 0 else {}
    return {request: one for part in world.all_gather(made) for request, one in part.items()}


@dataclass(frozen=True)
class _Share:
    """What one rank makes, and where it lies in its pack: its images, once more without class if guided, padding."""

    mine: list[Request]
    copies: int
    layout: PackLayout
    slots: int

    @classmethod
    def of(cls, requests: list[Request], copies: int, world: World, tensor: int) -> "_Share":
        cost = np.array([r.tokens for r in requests])
        shares, longest = partition(cost, world.size // tensor), int(cost.max())
        capacity = copies * max(int(cost[s].sum()) for s in shares)
        slots = copies * max(len(s) for s in shares) + -(-capacity // longest)
        mine = [requests[i] for i in shares[world.rank // tensor].tolist()]
        layout = lay_out([(r.rows, r.columns) for r in mine] * copies, PackShape(capacity, slots, longest))
        return cls(mine, copies, layout, slots)

    @property
    def tokens(self) -> int:
        """Of its images, each once."""
        return self.layout.tokens // self.copies


class _Field:
    """The guided velocity of a share's tokens, packed without padding: (N, 16), (I,) -> (N, 16) float32."""

    def __init__(
        self, network: Network, share: _Share, model: ModelConfig, sampling: SamplingConfig, device: torch.device
    ):
        self._network, self._share, self._sampling, self._device = network, share, sampling, device
        packing = packing_to_torch(share.layout)
        self._packing = Packing(**{
            name: to_device(value, device) if isinstance(value, Tensor) else value
            for name, value in vars(packing).items()
        })  # fmt: skip
        label_I = torch.full((share.slots,), model.classes)
        label_I[: len(share.mine)] = torch.tensor([r.label for r in share.mine], dtype=torch.int64)
        self._label_I = to_device(label_I, device)
        ropes = [r.rope or rope_of(sampling, model, r.rows, r.columns) for r in share.mine] * share.copies
        ropes += [RopeConfig()] * (share.slots - len(ropes))
        self._rope = extrapolated_table(self._packing, ropes, model.head_dim, model.rope_theta)

    @property
    def images(self) -> Images:
        tokens, count = self._share.tokens, len(self._share.mine)
        packing = self._packing
        return Images(packing.image_T[:tokens], packing.place_T[:tokens], packing.cu_seqlens_I1.diff()[:count].long())

    def __call__(self, x_NC: Tensor, t_I: Tensor) -> Tensor:
        share, cfg = self._share, self._sampling.cfg
        x_TC = x_NC.new_zeros(len(self._packing.image_T), TOKEN_CHANNELS)
        t_slots = x_NC.new_zeros(share.slots)
        for copy in range(share.copies):
            x_TC[copy * share.tokens : (copy + 1) * share.tokens] = x_NC
            t_slots[copy * len(share.mine) : (copy + 1) * len(share.mine)] = t_I
        velocity_TC = self._network(x_TC, t_slots, self._label_I, self._packing, self._rope).float()
        conditional_NC = velocity_TC[: share.tokens]
        if share.copies == 1:
            return conditional_NC
        free_NC = velocity_TC[share.tokens : 2 * share.tokens]
        guided_NC = free_NC + cfg * (conditional_NC - free_NC)
        if self._sampling.guided_channels == "all":
            return guided_NC
        return torch.cat((guided_NC[:, :_FIRST_THREE], conditional_NC[:, _FIRST_THREE:]), 1)

    def idle(self) -> None:
        """A call of the network for the sake of the ranks that need theirs."""
        self(torch.zeros(self._share.tokens, TOKEN_CHANNELS, device=self._device), torch.zeros((), device=self._device))


def rope_of(sampling: SamplingConfig, model: ModelConfig, rows: int, columns: int) -> RopeConfig:
    """The positions that ``sampling`` asks for at a size; what it leaves to "auto" is as published."""
    chosen, asked = default_rope(model.rope, rows, columns), {}
    if sampling.rope != "auto":
        asked["mode"], asked["attention_scale"] = sampling.rope, "none"
    if sampling.attention_scale != "auto":
        asked["attention_scale"] = sampling.attention_scale
    return chosen.model_copy(update=asked)


def _solve(
    velocity: Velocity, images: Images, requests: list[Request], sampling: SamplingConfig, seed: int
) -> dict[Request, Sample]:
    device = images.image_N.device
    index_I = torch.tensor([r.index for r in requests], dtype=torch.int64, device=device)

    def noise(draw: int) -> Tensor:
        words = noise_words(Purpose.SAMPLER_NOISE, seed, draw, index_I[images.image_N], images.place_N)
        return normal(words).float()

    x_NC, nfe_I = noise(0), images.count(0)
    match sampling.solver:
        case "euler":
            x_NC, nfe_I = euler(velocity, x_NC, images, sampling.steps)
        case "heun":
            x_NC, nfe_I = heun(velocity, x_NC, images, sampling.steps)
        case "sde":
            x_NC, nfe_I = sde(velocity, x_NC, images, sampling.steps, lambda k: noise(k + 1))
        case "dopri5" if requests:
            x_NC, nfe_I = dopri5(velocity, x_NC, images, sampling.atol, sampling.rtol)
    made, at, x = {}, 0, x_NC.cpu().numpy()
    for r, nfe in zip(requests, nfe_I.tolist(), strict=True):
        made[r] = Sample(x[at : at + r.tokens].reshape(r.rows, r.columns, TOKEN_CHANNELS), nfe)
        at += r.tokens
    return made


@contextmanager
def _lockstep(field: _Field, world: World) -> Iterator[Velocity]:
    """For ranks that need the network differently often, but must call it equally often, as all hold parts of it: who
    is done, or has failed, goes on calling until all are."""

    def anyone(working: int) -> bool:
        return world.size > 1 and world.all_reduce_sum(torch.tensor([working])).item() > 0

    def velocity(x_NC: Tensor, t_I: Tensor) -> Tensor:
        anyone(1)
        return field(x_NC, t_I)

    try:
        yield velocity
    finally:
        while anyone(0):
            field.idle()
