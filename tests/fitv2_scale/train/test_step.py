"""The order of what one optimizer step does."""

from types import SimpleNamespace

import torch

from fitv2_scale.model.loss_groups import GROUPS
from fitv2_scale.train import step
from tests.support.layout_grid import make_config


def test_the_update_waits_for_the_copy_of_a_save_and_the_backward_passes_do_not(monkeypatch):
    losses = SimpleNamespace(weighted_sum=lambda packed: torch.zeros(()))
    monkeypatch.setattr(step, "pack_to_torch", lambda pack, device: pack)
    objective = SimpleNamespace(training_batch=lambda packed: None, losses=lambda *arguments: losses)
    monkeypatch.setattr(step, "group_sums", lambda *arguments: torch.zeros((2, len(GROUPS))))
    acts: list[str] = []
    engine = SimpleNamespace(
        network=None,
        backward=lambda loss, last: acts.append(f"backward, last={last}"),
        step=lambda lr, max_norm: acts.append("update"),
    )
    batch = SimpleNamespace(step=3, packs=[None, None])
    step.train_step(engine, batch, objective, make_config(), torch.device("cpu"), lambda: acts.append("wait"))
    assert acts == ["backward, last=False", "backward, last=True", "wait", "update"]
