"""`fitv2 bench step`: the reference computes what we compute, and the report holds what it promises."""

import gc
import json
import os
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from data_sharding.errors import UserError
from fitv2_scale.bench import released_recipe, step, step_rounds
from fitv2_scale.bench.released_recipe import ReleasedTrainer
from fitv2_scale.bench.step_data import open_steps
from fitv2_scale.bench.step_report import to_text
from fitv2_scale.cli.__main__ import main
from fitv2_scale.config.load import load_config
from fitv2_scale.config.schema import Config
from fitv2_scale.data import Data
from fitv2_scale.model.counts import forward_flops
from fitv2_scale.model.network import DiffusionTransformer
from fitv2_scale.model.objective import image_means
from fitv2_scale.model.to_torch import pack_to_torch
from tests.support.tiny_networks import build
from tests.support.tiny_runs import BENCHED


def config_of(*overrides: str) -> Config:
    changed = {word.partition("=")[0] for word in overrides}
    kept = [word for word in BENCHED if word.partition("=")[0] not in changed]
    return load_config("configs/demo.yaml", [*kept, *overrides])


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_the_reference_has_our_loss_and_our_gradient(checkpointing, monkeypatch):
    """The same images, noise and times, padded with a dense mask and packed: losses to 1e-6, gradients to 1e-5."""
    monkeypatch.setattr(released_recipe, "_MICRO_BATCH", 5)
    config = config_of("layout.max_tokens=4096")
    with open_steps(config, Data.open(config, (1,)), 0, 1) as stream:
        (batch,) = stream
    theirs = ReleasedTrainer(config, torch.device("cpu"), checkpointing)
    theirs.network.load_state_dict(build(config.model).state_dict())
    (padded,) = theirs.micro_batches(batch)
    x1, position, mask, label = padded
    x0, t = torch.randn_like(x1), torch.rand(len(label))
    expected = theirs.loss(x1, x0, t, label, position, mask)
    expected.backward()

    # The packed order of the same images, found by their latents.
    packed = pack_to_torch(batch.packs[0], torch.device("cpu"))
    cu = packed.packing.cu_seqlens_I1.tolist()
    first = {tuple(x1[row, 0].tolist()): row for row in range(len(label))}
    rows = [first[tuple(packed.latents_TC[cu[i]].tolist())] for i in range(len(label))]
    noise = torch.zeros_like(packed.latents_TC)
    noise[: cu[len(rows)]] = torch.cat([x0[row, : mask[row].sum()] for row in rows])
    spare = len(packed.label_I) - len(rows)
    t_I = torch.cat((t[rows], torch.rand(spare)))
    ours = build(config.model)
    t_T1 = t_I[packed.packing.image_T][:, None]
    x_TC = t_T1 * packed.latents_TC + (1 - t_T1) * noise
    velocity = ours(x_TC, t_I, packed.label_I, packed.packing)
    loss = (image_means((velocity - (packed.latents_TC - noise)).square(), packed) * packed.weight_I).sum()
    loss.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for (name, p), q in zip(ours.named_parameters(), theirs.network.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5, msg=name)


def test_a_reference_step_adds_up_its_micro_batches(monkeypatch):
    """Three micro-batches of 2, 2 and 1 images move weights and EMA as one of five does."""
    config = config_of("flow.label_dropout=0", "optimizer.warmup_steps=0")
    with open_steps(config, Data.open(config, (1,)), 0, 1) as stream:
        (batch,) = stream
    found = []
    for size in (5, 2):
        monkeypatch.setattr(released_recipe, "_MICRO_BATCH", size)
        monkeypatch.setattr(torch, "randn_like", torch.zeros_like)  # no noise, one time: nothing depends on the order
        monkeypatch.setattr(torch, "randn", lambda *size: torch.zeros(*size))
        trainer = ReleasedTrainer(config, torch.device("cpu"))
        trainer.network.load_state_dict(build(config.model).state_dict())
        loss = trainer.step(batch)
        found.append((loss, trainer.network.state_dict(), trainer._ema))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for name in found[0][1]:
        torch.testing.assert_close(found[0][1][name], found[1][1][name], rtol=1e-4, atol=2e-4, msg=name)


@pytest.mark.parametrize("ours,asked,passes", [("none", ["full"], 2), ("full", [], 1), ("selective", ["none"], 1)])
def test_what_the_reference_computes_again_is_its_own_choice(ours, asked, passes, monkeypatch, capsys):
    """Five images are one micro-batch, and two steps are taken: one to warm up, one that is measured."""
    calls = []
    block = released_recipe._block
    monkeypatch.setattr(released_recipe, "_block", lambda *inputs: (calls.append(1), block(*inputs))[1])
    option = [f"--reference-checkpointing={choice}" for choice in asked]
    arguments = ["bench", "step", "configs/demo.yaml", *BENCHED, f"layout.checkpointing={ours}", "--steps=1"]
    assert main([*arguments, "--repeats=1", "--against=reference", *option, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(calls) == 2 * 2 * passes  # steps, blocks
    assert report["reference"]["checkpointing"] == (asked or ["none"])[0]
    assert report["layout"]["checkpointing"] == ours
    assert f"is {ours} for ours, {(asked or ['none'])[0]} for the reference" in to_text(report)


@pytest.mark.parametrize("wanted", [False, True])
def test_the_key_deterministic_is_for_ours(wanted, monkeypatch):
    seen = {"ours": set(), "reference": set()}

    def noting(who: str, take: Callable) -> Callable:
        return lambda *args: (seen[who].add(torch.are_deterministic_algorithms_enabled()), take(*args))[1]

    monkeypatch.setattr(step_rounds, "train_step", noting("ours", step_rounds.train_step))
    monkeypatch.setattr(ReleasedTrainer, "step", noting("reference", ReleasedTrainer.step))
    report = step.measure(config_of(f"deterministic={str(wanted).lower()}"), 1, 1, "none")
    assert report["deterministic"] == wanted and seen == {"ours": {wanted}, "reference": {False}}


def test_a_choice_for_a_reference_that_is_not_measured_is_refused(capsys):
    assert main(["bench", "step", "configs/demo.yaml", *BENCHED, "--reference-checkpointing", "full"]) == 2
    assert "--reference-checkpointing needs --against reference" in capsys.readouterr().err


def test_the_reference_has_one_objective(capsys):
    words = ["bench", "step", "configs/demo.yaml", *BENCHED, "--steps=1", "--repeats=1", "--against=reference"]
    assert main([*words, "objective=ddpm", "sampling.solver=ddpm"]) == 2
    assert "--against reference needs the released objective: set objective=flow" in capsys.readouterr().err


def test_a_preset_has_latents_of_its_sizes():
    config = config_of()
    data = Data.open(config, (1, 1))
    for rank in range(2):
        with open_steps(config, data, rank, 2) as stream:
            batches = list(stream)
        for batch in batches:
            images = [n for pack in batch.packs for n in np.diff(pack.layout.cu_seqlens)[pack.weight > 0].tolist()]
            assert sorted(batch.step_lengths.tolist()) == sorted(data.plan.step(batch.step).tokens.tolist())
            assert set(images) <= set(batch.step_lengths.tolist())
            assert all(np.abs(pack.latents[: pack.layout.tokens]).min(1).max() > 0 for pack in batch.packs)


def test_the_report(capsys):
    config = config_of()
    arguments = ["bench", "step", "configs/demo.yaml", *BENCHED, "tracking.peak_tflops=2"]
    assert main([*arguments, "--json", "--steps", "2", "--repeats", "2", "--against", "reference"]) == 0
    report = json.loads(capsys.readouterr().out)
    plan = Data.open(config, (1,)).plan
    lengths = [plan.step(k).tokens.tolist() for k in range(2)]
    flops = sum(3 * forward_flops(config.model, n) for step in lengths for n in step) / 2
    seconds = report["seconds_a_step"]["median"]
    assert 0 < report["cpu_seconds_a_step"]["lowest"] <= 1.1 * os.cpu_count() * report["seconds_a_step"]["highest"]
    assert report["flops_a_step"] == flops
    assert report["images_per_second"] == pytest.approx(5 / seconds)
    assert report["tokens_per_second"] == pytest.approx(sum(map(sum, lengths)) / 2 / seconds)
    assert report["mfu"] == pytest.approx(flops / seconds / 2e12) and report["peak_tflops"] == 2
    assert list(report["seconds_by_part"]) == ["data", "forward", "backward", "reduce", "optimizer", "ema"]
    for name in ("times_as_long", "times_the_cpu_seconds"):
        times = report["reference"][name]
        assert times["lowest"] <= times["median"] <= times["highest"]
    assert report["syncs_in_a_step"] is None and report["peak_bytes"] is None  # no GPU
    assert main([*arguments, "--steps", "1", "--repeats", "1"]) == 0
    assert "MFU" in capsys.readouterr().out


@pytest.mark.parametrize("compile_blocks", ["false", "true"])
def test_a_round_leaves_no_weights_behind(compile_blocks, monkeypatch):
    """They would count in the peak of the next round. Nothing but the measurement may free them: no collection of
    cycles that happens to come."""
    weights: list[weakref.ref] = []

    def remembered(make: Callable) -> Callable:
        def made(*args: Any) -> Any:
            assert not any(weight() is not None for weight in weights)
            trainer = make(*args)
            weights.extend(map(weakref.ref, trainer.network.parameters()))
            return trainer

        return made

    for module, name in ((step_rounds, "make_engine"), (step, "ReleasedTrainer")):
        monkeypatch.setattr(module, name, remembered(getattr(module, name)))
    gc.disable()
    try:
        step.measure(config_of(f"layout.compile={compile_blocks}"), 1, 2, "none")
    finally:
        gc.enable()
    tensors = len(list(DiffusionTransformer(config_of().model).parameters()))
    assert len(weights) == 4 * tensors and not any(weight() is not None for weight in weights)


def test_the_reference_is_the_released_network_alone():
    with pytest.raises(UserError, match="qk_norm"):
        step.measure(config_of("model.qk_norm=none"), 1, 1, "none")
