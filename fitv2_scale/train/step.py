"""One optimizer step."""

from collections.abc import Callable

import torch
from torch import Tensor

from data_sharding.stream.batch import StepBatch
from fitv2_scale.config.schema import Config
from fitv2_scale.model.loss_groups import GROUPS, group_sums
from fitv2_scale.model.objective import NoisedBatch, Objective
from fitv2_scale.model.packed_batch import PackedBatch
from fitv2_scale.model.to_torch import pack_to_torch
from fitv2_scale.parallel.engine import Engine, StepResult


def train_step(
    engine: Engine,
    batch: StepBatch,
    objective: Objective,
    config: Config,
    device: torch.device,
    wait_for_staging: Callable[[], None] = lambda: None,
    audit: Callable[[PackedBatch, NoisedBatch], None] = lambda packed, noised: None,
) -> tuple[Tensor, StepResult]:
    """Hands one optimizer step on this rank's part of ``batch`` to ``device``; the host does not wait for it.

    ``wait_for_staging`` is called between the last backward pass and the update: it returns once the weights, moments
    and EMA may change (see ``Checkpointer``). ``audit`` is shown what each pack is trained on.

    Returns this rank's part of the loss by group, float32 (2, groups) on the device (see ``loss_groups.group_sums``),
    which adds up over the data-parallel ranks, and the engine's result.
    """
    total = torch.zeros((2, len(GROUPS)), device=device)
    for i, pack in enumerate(batch.packs):
        packed = pack_to_torch(pack, device)
        noised = objective.training_batch(packed)
        audit(packed, noised)
        losses = objective.losses(engine.network, noised, packed)
        engine.backward(poison_if_not_finite(losses.weighted_sum(packed)), last=i == len(batch.packs) - 1)
        total += group_sums(losses, packed)
    wait_for_staging()
    return total, engine.step(config.optimizer.lr_at(batch.step), config.optimizer.max_norm)


def poison_if_not_finite(loss: Tensor) -> Tensor:
    """``loss``, unchanged if it is finite; otherwise NaN, and so is every gradient that flows from it.

    The norm of the gradient, which every rank learns anyway, therefore shows whether the loss of any rank was not
    finite.
    """
    return loss * (1.0 + 0.0 * loss.detach())  # the factor is exactly 1, or NaN
