"""Pictures from the network: Euler's method from noise (t = 0) to data (t = 1), with classifier-free guidance.

The noise of image i is keyed by (seed, i) alone, so the pictures do not depend on how many ranks make them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_sharding.deal import Shape, spread
from data_sharding.keyed import Purpose
from data_sharding.packing import lay_out
from fitv2_scale.batches import packing_to_torch
from fitv2_scale.keyed import normal
from fitv2_scale.model.config import TOKEN_CHANNELS
from fitv2_scale.model.flow import noise_words
from fitv2_scale.model.packing import PackedBatch
from fitv2_scale.parallel.world import World


@dataclass(frozen=True)
class Request:
    index: int  # of the image, which keys its noise
    label: int
    rows: int  # in tokens
    columns: int

    @property
    def tokens(self) -> int:
        return self.rows * self.columns


@torch.no_grad()
def sample(
    network: Callable[..., Tensor],
    requests: list[Request],
    *,
    classes: int,
    cfg: float,
    steps: int,
    seed: int,
    world: World,
    tensor: int = 1,
) -> dict[int, np.ndarray]:
    """Latent tokens (rows, columns, 16) float32 of every request by its index, on all ranks.

    A collective: each rank makes its share in one pack, all packs of one shape, so that all call the network alike.
    The ``tensor`` ranks of a tensor group make the same share together.
    """
    guided = cfg != 1.0
    cost = np.array([r.tokens for r in requests])
    shares = spread(cost, world.size // tensor)
    copies = 2 if guided else 1
    longest = int(cost.max())
    capacity = copies * max(int(cost[s].sum()) for s in shares)
    slots = copies * max(len(s) for s in shares) + -(-capacity // longest)
    shape = Shape(capacity, slots, longest)

    mine = [requests[i] for i in shares[world.rank // tensor].tolist()]
    layout = lay_out([(r.rows, r.columns) for r in mine] * copies, shape)
    packing = packing_to_torch(layout)
    label_I, index_I = torch.full((slots,), classes), torch.zeros(slots, dtype=torch.int64)
    label_I[: len(mine)] = torch.tensor([r.label for r in mine], dtype=torch.int64)
    index_I[: len(mine) * copies] = torch.tensor([r.index for r in mine] * copies, dtype=torch.int64)
    zeros_I = torch.zeros(slots, dtype=torch.int64)
    batch = PackedBatch(torch.zeros(0), packing, label_I, torch.zeros(slots), index_I, zeros_I).to(world.device)

    place_T, packing = batch.packing.place_T, batch.packing
    index_T = batch.sample_id_I[packing.image_T]
    x_TC = normal(noise_words(Purpose.SAMPLER_NOISE, seed, 0, index_T, place_T)).float()
    half = layout.tokens // copies
    for k in range(steps):
        t_I = torch.full((slots,), k / steps, device=world.device)
        velocity_TC = network(x_TC, t_I, batch.label_I, packing).float()
        if guided:
            conditional, free = velocity_TC[:half], velocity_TC[half : 2 * half]
            both = free + cfg * (conditional - free)
            velocity_TC = torch.cat((both, both, velocity_TC[2 * half :]))
        x_TC = x_TC + velocity_TC / steps

    made, at, x = {}, 0, x_TC.cpu().numpy()
    for r in mine:
        made[r.index] = x[at : at + r.tokens].reshape(r.rows, r.columns, TOKEN_CHANNELS)
        at += r.tokens
    return {index: tokens for part in world.gather(made) for index, tokens in part.items()}
