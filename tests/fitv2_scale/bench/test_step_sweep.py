"""`fitv2 bench step --sweep`: ratios in one round, the slowest rank, and what is kept."""

import json

import pytest
import torch

from fitv2_scale.bench import step_sweep
from fitv2_scale.bench.step_rounds import Round
from fitv2_scale.bench.step_sweep import Measured, measure, to_text, variants
from fitv2_scale.cli.__main__ import main
from fitv2_scale.config.load import load_config
from fitv2_scale.parallel import gpu_kernels
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import BENCHED

FASTER = {
    "reshard_after_forward": {"never": 0.8},
    "prefetch_blocks": {2: 0.9, 4: 0.95},
    "gate_and_value": {"merged": 1.2},
    "kernels": {"triton": 0.5},
}

BEST = ["layout.reshard_after_forward=never", "layout.prefetch_blocks=2", "layout.kernels=triton"]


def config_of(*overrides: str):
    return load_config("configs/demo.yaml", [*BENCHED, *overrides])


def swept(config, slow_rank: int | None = None, too_large: str | None = None, rounds: int = 3) -> dict | None:
    """The report if steps take as long as ``FASTER`` says: rounds of 1 s, 2 s, 3 s …, twice that on a slow rank."""
    begun = 0

    def round_of(case, batches):
        nonlocal begun
        layout = case.config.layout
        begun += layout == config.layout
        if getattr(layout, too_large or "engine") in ("never", "triton"):
            raise torch.OutOfMemoryError
        seconds = float(begun) * (2 if case.world.rank == slow_rank else 1)
        for key, factors in FASTER.items():
            seconds *= factors.get(getattr(layout, key), 1)
        return None, Round(seconds, seconds, 100 + case.world.rank)

    step_sweep.our_round = round_of
    return measure(config, 1, rounds)


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.setattr(step_sweep, "our_round", step_sweep.our_round)


def test_keys_that_help_are_measured_together():
    report = swept(config_of())
    rows = {row["config"]: row for row in report["configs"]}
    medians = {name: row["times_as_long"]["median"] for name, row in rows.items()}
    never, two, four, merged, triton, padded = (
        "layout.reshard_after_forward=never", "layout.prefetch_blocks=2", "layout.prefetch_blocks=4",
        "layout.gate_and_value=merged", "layout.kernels=triton", "layout.pad_to_multiple_of=128",
    )  # fmt: skip
    best = f"{never} {two} {triton}"  # of one key the better value
    expected = {"as given": 1, never: 0.8, two: 0.9, four: 0.95, merged: 1.2, triton: 0.5, padded: 1, best: 0.36}
    assert medians == pytest.approx(expected)
    assert rows[never]["seconds_a_step"] == pytest.approx({"median": 1.6, "lowest": 0.8, "highest": 2.4})
    assert rows[best]["seconds_a_step"]["median"] == pytest.approx(0.36 * 5)  # rounds 4 to 6
    assert rows[best]["as_given_seconds"] == {"median": 5, "lowest": 4, "highest": 6}  # the same rounds
    assert rows[never]["as_given_seconds"] == {"median": 2, "lowest": 1, "highest": 3}
    assert [name for name, row in rows.items() if row["within_noise"]] == ["as given", padded]
    assert report["best"] == best.split() and report["rounds"] == 3 and rows[merged]["peak_bytes"] == 100
    text = to_text(report).splitlines()
    assert text[-1] == f"best     {best}" and text[1] == "as given: 2 (1 to 3) s, 0.00 GiB"
    assert text[2].startswith("0.800 (0.800 to 0.800) times as long, 1.6 (0.8 to 2.4) s for 2 s as given")
    assert f"0.360 (0.360 to 0.360) times as long, 1.8 (1.44 to 2.16) s for 5 s as given, 0.00 GiB: {best}" in text
    assert f"noise    as large as the difference from the config as given: {padded}" in text


def test_what_does_not_fit_is_left_out():
    report = swept(config_of(), too_large="kernels")
    assert report["best"] == ["layout.reshard_after_forward=never", "layout.prefetch_blocks=2"]
    assert "too little memory: layout.kernels=triton" in to_text(report).splitlines()


def test_nothing_helps():
    report = swept(config_of(*BEST))
    assert report["best"] == [] and "no key makes a step half a percent faster" in to_text(report)


def test_the_slowest_rank_counts_and_rank_0_reports():
    report, other = run_ranks(2, swept, config_of(), 1)
    assert other is None and report["best"] == BEST
    given = next(row for row in report["configs"] if row["config"] == "as given")
    assert given["seconds_a_step"]["median"] == 4 and given["peak_bytes"] == 101


def test_zero3_has_fewer_keys():
    zero3 = config_of("layout.engine=zero3")
    tried, refused = variants(zero3, torch.device("cpu"))
    assert list(tried) == ["layout.pad_to_multiple_of=128"]
    assert refused["layout.kernels=triton"] == (
        "layout.kernels=triton is for layout.engine=fsdp: leave it out with zero3"
    )
    assert refused.keys() == {
        "layout.reshard_after_forward=never", "layout.prefetch_blocks=2", "layout.prefetch_blocks=4",
        "layout.gate_and_value=merged", "layout.kernels=triton", "layout.attention=flash4",
    }  # fmt: skip


def test_what_is_not_tried_is_named_with_the_reason():
    report = swept(config_of())
    reasons = {one["config"]: one["why"] for one in report["not_tried"]}
    assert reasons.keys() == {"layout.precision", "layout.checkpointing", "layout.attention=flash4"}
    assert "does not compute in float32" in reasons["layout.attention=flash4"]
    text = to_text(report)
    assert "untried  layout.precision: changes losses" in text and "untried  layout.attention=flash4: " in text
    assert "CPU      these keys are for GPUs" in text
    assert "CPU  " not in to_text(report | {"machine": "NVIDIA H200"})


@pytest.mark.parametrize(
    ("seconds", "noise"),
    [
        ([0.80, 0.81, 0.82], False),
        ([0.90, 0.95, 0.99], True),  # the nearest is half way to 1, and further
        ([0.90, 0.95, 0.97], False),
        ([0.98, 0.99, 1.02], True),
        ([0.80, 0.81, 0.40], False),  # a round that was slow or fast for other reasons, away from 1
        ([1.45, 1.47, 2.45], False),
        ([1.01, 1.05, 1.50], True),
        ([0.97], False),  # one round shows none
    ],
)
def test_a_difference_within_the_noise(seconds, noise):
    """Ratios in rounds in which the given config takes 1, 2, 3 s."""
    given = [float(n) for n in range(1, len(seconds) + 1)]
    one = Measured([mine * theirs for mine, theirs in zip(seconds, given, strict=True)], given, None)
    assert one.is_noise == noise
    assert one.is_faster == (not noise and sorted(seconds)[len(seconds) // 2] < 1)


def test_one_round_says_nothing_of_noise():
    text = to_text(swept(config_of(), rounds=1))
    assert text.startswith("1 round of 1 step on 1 x CPU") and "noise    unknown after one round" in text


@pytest.mark.parametrize(
    ("precision", "deterministic", "usable"), [("bf16", False, True), ("fp32", False, False), ("bf16", True, False)]
)
def test_flash4_is_tried_where_it_may_be_used(precision, deterministic, usable, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(gpu_kernels, "installed", lambda: {"flash-attn-4": "4.0"})
    layout = config_of().layout.model_copy(update={"precision": precision})
    config = config_of(f"deterministic={deterministic}").model_copy(update={"layout": layout})
    assert ("layout.attention=flash4" in variants(config, torch.device("cuda", 0))[0]) == usable
    tried, refused = variants(config, torch.device("cpu"))
    assert "layout.attention=flash4" not in tried and refused["layout.attention=flash4"]


def test_the_command(capsys):
    assert main(["bench", "step", "configs/demo.yaml", *BENCHED, "--sweep", "--steps=1", "--repeats=1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["configs"]) >= 5 and all(row["seconds_a_step"]["median"] > 0 for row in report["configs"])
    assert main(["bench", "step", "configs/demo.yaml", *BENCHED, "--sweep", "--against=reference"]) == 2
    assert "leave --against out" in capsys.readouterr().err
