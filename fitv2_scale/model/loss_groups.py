"""The loss by time and by resolution: sums of each pack on the device, where the host does not wait for them; names on
the host.

A group's loss is the sum over its images of weight x loss, divided by the sum of their weights. The first group is all
images. So the losses by time, each multiplied by its part of the weight, add up to the loss; those by resolution too.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from fitv2_scale.model.objective import ImageLosses
from fitv2_scale.model.packed_batch import PackedBatch

_TIMES = 4  # buckets of equal width; in the first is mostly noise
_SHORTEST, _LENGTHS = 64, 6  # up to 64 tokens, then up to twice as many; the last is without an end

_EDGES = [_SHORTEST << k for k in range(_LENGTHS - 1)]
GROUPS = (
    "loss",
    *(f"loss_t{k}" for k in range(_TIMES)),
    *(f"loss_tokens_le{edge}" for edge in _EDGES),
    f"loss_tokens_gt{_EDGES[-1]}",
)


@torch.no_grad()
def group_sums(losses: ImageLosses, batch: PackedBatch) -> Tensor:
    """float32 (2, groups), on the device: for each of GROUPS the sum of weight x loss, and of weight."""
    device = losses.time_I.device
    time_I = (losses.time_I * _TIMES).long().clamp(max=_TIMES - 1)
    edges = _SHORTEST << torch.arange(_LENGTHS - 1, device=device)
    length_I = (batch.packing.cu_seqlens_I1.diff()[:, None] > edges).sum(-1)
    everyone_I1 = torch.ones_like(time_I, dtype=torch.bool)[:, None]
    by_time_IG = time_I[:, None] == torch.arange(_TIMES, device=device)
    by_length_IG = length_I[:, None] == torch.arange(_LENGTHS, device=device)
    member_IG = torch.cat((everyone_I1, by_time_IG, by_length_IG), -1)
    sums_2I1 = torch.stack((losses.loss_I * batch.weight_I, batch.weight_I))[:, :, None]
    return (sums_2I1 * member_IG).sum(1)


def loss_by_group(sums: Iterable[Iterable[float]]) -> dict[str, float]:
    """The loss of each group but the first that had images, from the sums over steps and ranks of what ``group_sums``
    gave: {"loss_t0": 1.2, …, "loss_tokens_le256": 0.9}"""
    return {name: x / w for name, x, w in list(zip(GROUPS, *sums, strict=True))[1:] if w > 0}
