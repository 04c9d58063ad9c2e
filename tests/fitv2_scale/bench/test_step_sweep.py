"""`fitv2 bench step --sweep`: ratios in one round, the slowest rank, and what is kept."""

import json

import pytest
import torch

from fitv2_scale.bench import step_sweep
from fitv2_scale.bench.step_rounds import Round
from fitv2_scale.bench.step_sweep import measure, to_text, variants
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


def swept(config, slow_rank: int | None = None, too_large: str | None = None) -> dict | None:
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
    return measure(config, 1, 3)


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
    assert report["best"] == best.split() and report["rounds"] == 3 and rows[merged]["peak_bytes"] == 100
    assert to_text(report).splitlines()[-1] == f"best     {best}"


def test_what_does_not_fit_is_left_out():
    report = swept(config_of(), too_large="kernels")
    assert report["best"] == ["layout.reshard_after_forward=never", "layout.prefetch_blocks=2"]
    assert "inf times as long" in to_text(report)


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
    assert list(variants(zero3, torch.device("cpu"))) == ["layout.pad_to_multiple_of=128"]


@pytest.mark.parametrize(
    ("precision", "deterministic", "usable"), [("bf16", False, True), ("fp32", False, False), ("bf16", True, False)]
)
def test_flash4_is_tried_where_it_may_be_used(precision, deterministic, usable, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(gpu_kernels, "installed", lambda: {"flash-attn-4": "4.0"})
    layout = config_of().layout.model_copy(update={"precision": precision})
    config = config_of(f"deterministic={deterministic}").model_copy(update={"layout": layout})
    assert ("layout.attention=flash4" in variants(config, torch.device("cuda", 0))) == usable
    assert "layout.attention=flash4" not in variants(config, torch.device("cpu"))


def test_the_command(capsys):
    assert main(["bench", "step", "configs/demo.yaml", *BENCHED, "--sweep", "--steps=1", "--repeats=1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["configs"]) >= 5 and all(row["seconds_a_step"]["median"] > 0 for row in report["configs"])
    assert main(["bench", "step", "configs/demo.yaml", *BENCHED, "--sweep", "--against=reference"]) == 2
    assert "leave --against out" in capsys.readouterr().err
