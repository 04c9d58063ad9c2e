"""One optimizer step."""

import torch
from torch import Tensor

from data_sharding.stream.batch import StepBatch
from fitv2_scale.model.flow import flow_losses
from fitv2_scale.model.loss_groups import NAMES, tally
from fitv2_scale.model.to_torch import pack_to_torch
from fitv2_scale.parallel.engine import StepResult
from fitv2_scale.train.session import Session


def train_step(s: Session, batch: StepBatch) -> tuple[Tensor, StepResult]:
    """One optimizer step, handed to the device; nothing is waited for.

    Returns this rank's share of the loss by group, on the device (see ``loss_groups.tally``): the data-parallel ranks'
    shares add up to it.
    """
    config, total = s.config, torch.zeros((2, len(NAMES)), device=s.world.device)
    for i, pack in enumerate(batch.packs):
        packed = pack_to_torch(pack, s.world.device)
        losses = flow_losses(s.engine.network, packed, config.flow, config.model.classes, config.seed)
        s.engine.backward(telling(losses.share(packed)), last=i == len(batch.packs) - 1)
        total += tally(losses, packed)
    if s.audit:
        s.audit.record(batch)
    s.staged()
    return total, s.engine.step(config.optimizer.lr_at(batch.step), config.optimizer.max_norm)


def telling(loss: Tensor) -> Tensor:
    """``loss``; but if it is not finite, neither is any gradient that flows from it.

    So the norm of the gradient, which every rank learns anyway, also tells whether any rank's loss was not finite.
    """
    return loss * (1.0 + 0.0 * loss.detach())  # the factor is exactly 1, or NaN
