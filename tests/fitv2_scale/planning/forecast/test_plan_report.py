"""Step time, storage and node count that `fitv2 plan` says, against arithmetic by hand and a run's real files."""

import json
import math
from pathlib import Path

import pytest
import yaml

from data_sharding.errors import UserError
from data_sharding.format.manifest import Manifest
from fitv2_scale.cli.__main__ import main
from fitv2_scale.config.layout import Layout
from fitv2_scale.config.load import load_config
from fitv2_scale.data import Data
from fitv2_scale.planning.forecast.assumptions import Assumptions
from fitv2_scale.planning.forecast.disk_usage import commit_bytes, kept_steps, storage_report
from fitv2_scale.planning.forecast.node_count import NodeOption, candidates, choose, explain, until_decided
from fitv2_scale.planning.forecast.step_time import estimate_step_time, exposed_seconds, traffic_seconds
from fitv2_scale.train.loop import DONE, train
from tests.support.ranks import run_ranks

BIG = load_config("configs/fitv2_3b2.yaml", ["data.url=none"])
NUMBERS = 2_971_928_080
FULL = {"fill": 1.0, "packs_per_rank": 1.0}


def bench(folder: Path, **changes) -> str:
    """A file as `fitv2 bench step --json` prints it."""
    report = {
        "machine": "CPU",
        "ranks": 2,
        "seconds_a_step": {"median": 0.5, "lowest": 0.4, "highest": 0.6},
        "images_per_second": 24.0,  # 12 a step
        "fill": 0.8,
        "flops_a_step": 4e9,
        "peak_tflops": None,
        "seconds_by_part": {"optimizer": 0.06, "ema": 0.04},
    }
    file = folder / "bench.json"
    file.write_text(json.dumps(report | changes))
    return str(file)


# ---- the step ----


def test_transfers_of_a_step():
    a = Assumptions()
    within, between = traffic_seconds(BIG, Layout(1, 32), 8, a)  # sharded over four nodes: all on the network
    assert within == (0, 0)
    assert between == (pytest.approx(2 * NUMBERS * 31 / 32 / 50e9), pytest.approx(4 * NUMBERS * 31 / 32 / 50e9))
    within, between = traffic_seconds(BIG, Layout(4, 8), 8, a)  # HSDP: each link has its own part
    assert within == (pytest.approx(2 * NUMBERS * 7 / 8 / 450e9), pytest.approx(4 * NUMBERS * 7 / 8 / 450e9))
    assert between == (0, pytest.approx(2 * 4 * NUMBERS / 8 * 3 / 4 / 50e9))
    assert traffic_seconds(BIG, Layout(1, 8), 8, a)[1] == (0, 0)
    assert traffic_seconds(BIG, Layout(1, 1), 8, a) == ((0, 0), (0, 0))


def test_what_arithmetic_does_not_hide():
    a, hsdp = Assumptions(), Layout(4, 8)
    (gather, scatter), (_, exchange) = traffic_seconds(BIG, hsdp, 8, a)
    assert exposed_seconds(BIG, hsdp, 8, 10.0, 1, a) == 0
    # The backward pass, two thirds, hides the exchange just so.
    assert exposed_seconds(BIG, hsdp, 8, 1.5 * exchange, 1, a) == pytest.approx(0, abs=1e-12)
    assert exposed_seconds(BIG, hsdp, 8, 0.9 * exchange, 1, a) == pytest.approx(0.4 * exchange)
    # In two packs, only the second one's backward pass does.
    assert exposed_seconds(BIG, hsdp, 8, 2.4 * exchange, 2, a) == pytest.approx(0.2 * exchange)
    assert exposed_seconds(BIG, hsdp, 8, 0.0, 1, a) == pytest.approx(gather + max(gather + scatter, exchange))
    zero3 = load_config("configs/fitv2_3b2.yaml", ["data.url=none", "layout.engine=zero3"])
    gather, scatter = traffic_seconds(zero3, Layout(1, 32), 8, a)[1]
    assert exposed_seconds(zero3, Layout(1, 32), 8, 0.0, 3, a) == pytest.approx(3 * (2 * gather + scatter))


def test_a_step_at_a_stated_mfu():
    assumptions = Assumptions().with_given(mfu=0.4)
    step = estimate_step_time(BIG, Layout(1, 8), 8, 1e15, FULL | {"fill": 0.9}, assumptions)
    assert step.seconds == pytest.approx(1e15 / 0.9 / 8 / (0.4 * 989e12))
    assert step.source == "MFU 0.4 of 989 TFLOP/s; given"


def test_a_step_that_was_measured(tiny, tmp_path):
    config = tiny()
    assumptions = Assumptions().with_benchmarks([bench(tmp_path)], 1)
    as_measured = estimate_step_time(config, Layout(1, 2), 2, 4e9, FULL, assumptions)
    assert as_measured.seconds == pytest.approx(0.5) and as_measured.source.startswith("measured on 2 x CPU")
    # On four ranks with a better fill: the arithmetic is divided, the optimizer stays.
    elsewhere = estimate_step_time(config, Layout(1, 4), 4, 4e9, FULL | {"fill": 0.9}, assumptions)
    assert elsewhere.compute == pytest.approx(0.4 / 2 * 0.8 / 0.9) and elsewhere.fixed == pytest.approx(0.1)
    with pytest.raises(
        UserError, match=r"bench.json was measured at 3.33e\+08 FLOP per image, but this run takes 1.67e\+09"
    ):
        estimate_step_time(config, Layout(1, 2), 2, 2e10, FULL, assumptions)


def test_saves_that_were_measured(tmp_path):
    report = {"ranks": 2, "machine": "CPU", "bytes": 100, "stall_seconds": {"median": 0.2, "first": 9}}
    file = tmp_path / "saves.json"
    file.write_text(json.dumps(report | {"durable_seconds": {"median": 3.0}}))
    assumptions = Assumptions().with_benchmarks([str(file)], 200)
    assert (assumptions.stall_seconds.value, assumptions.durable_seconds.value) == (0.2, 6.0)
    assert "for 2e-07 rather than 1e-07 GB" in assumptions.durable_seconds.source


@pytest.mark.parametrize(
    "words,message",
    [
        (["--bench", "nothing.json"], "cannot read nothing.json: No such file"),
        (["--bench", "configs/demo.yaml"], "demo.yaml is not a report of `fitv2 bench step --json`"),
        (["--mfu", "40"], "mfu is 40: give a fraction of the peak"),
        (["--failures", "-1"], "failures per node day is -1"),
        (["--network", "0"], "network is 0"),
        (["--nodes", "0"], "give at least 1"),
    ],
)
def test_bad_input_of_plan(words, message, capsys):
    assert main(["plan", "configs/demo.yaml", *words]) == 2
    assert message in capsys.readouterr().err


def test_plan_without_data_says_how(capsys):
    assert main(["plan", "configs/demo.yaml", "data.url=/nowhere", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["memory"]["state_bytes_per_rank"]["held"] > 0 and report["goodput"] is report["time"] is None
    assert main(["plan", "configs/demo.yaml", "data.url=/nowhere"]) == 0
    assert "data.url=preset:imagenet256" in capsys.readouterr().out


def test_the_work_of_an_image_is_shown_for_two_lengths(capsys):
    """Three passes, two FLOPs a multiply-add, of 40 blocks of 2304 with 6144 hidden units and heads of rank 576."""
    d, m, rank, seen = 2304, 6144, 576, {}
    for tokens in (256, 1024):
        of_tokens = tokens * (40 * (4 * d * d + 3 * d * m + 2 * d * tokens) + 2 * d * 16)
        seen[tokens] = 6 * (of_tokens + 40 * 7 * d * rank + 6 * d * d + 256 * d + d * d + 2 * d * d) / 1e12
    assert main(["plan", "configs/fitv2_3b2.yaml", "data.url=/nowhere"]) == 0
    shown = f"{seen[256]:.3f} TFLOP per training image of 256 tokens, {seen[1024]:.3f} of 1,024"
    assert shown in capsys.readouterr().out


# ---- how many nodes ----


def choice(nodes: int, days: float, fits: bool = True) -> NodeOption:
    return NodeOption(nodes, 8 * nodes, nodes, 0.1, 0.0, 1.0, days, 24 * 8 * nodes * days, 10**9, fits)


def test_nodes_that_are_worth_it():
    tried = [choice(1, 8), choice(2, 4), choice(4, 2.2), choice(8, 2.0), choice(16, 1.0)]
    assert choose(tried, "H200").nodes == 4  # 8 would bring a tenth for twice the price
    assert explain(tried, choose(tried, "H200"), 256) == (
        "4 nodes (32 GPUs): with 256 images per step, more nodes hardly shorten the run; "
        "8 would take 9 % fewer days and 82 % more GPU-hours"
    )
    assert choose([choice(1, 8, fits=False), *tried[1:]], "H200").nodes == 4
    slower = [choice(1, 8), choice(2, 12)]
    assert "2 would take 50 % more days and 200 % more GPU-hours" in explain(slower, choose(slower, "H200"), 256)
    assert "the most that still give each rank one" in explain(tried[:3], choose(tried[:3], "H200"), 256)
    assert explain([choice(1, 8)], choice(1, 8), 256).startswith("1 node (8 GPUs), the most")
    with pytest.raises(UserError, match="a rank needs at least 1 GB, more than an A100 has"):
        choose([choice(1, 8, fits=False)], "A100")


def test_no_more_are_looked_at_than_it_takes():
    tried = [choice(1, 8, fits=False), choice(2, 4), choice(4, 2.2), choice(6, 2.1), choice(8, 2.0), choice(16, 1.0)]
    decided = until_decided(iter(tried), "H200")
    assert decided == tried[:5] and until_decided(tried[:3], "H200") == tried[:3]
    assert explain(decided, choose(decided, "H200"), 256) == explain(tried, choose(tried, "H200"), 256)


def test_every_rank_needs_an_image():
    assert candidates(8, 1, 64, asked=5) == [1, 2, 3, 4, 5, 6, 8]
    assert candidates(8, 2, 64, asked=1)[-1] == 16


# ---- storage ----


def test_kept_commits():
    config = BIG.checkpoint.model_copy(update={"keep_every": 100, "milestones": [50, 200, 9999]})
    assert kept_steps(config, 1000) == {50, *range(100, 1001, 100)}
    assert kept_steps(BIG.checkpoint, 1000) == set()


def test_a_run_does_not_keep_more_commits_than_it_makes():
    """Two would stay (``keep_last``), one is being saved, one about to be deleted."""
    size, checkpoint = commit_bytes(BIG), BIG.checkpoint.model_copy(update={"milestones": []})
    for commits, kept, held in ((1, 1, 1), (2, 2, 2), (3, 2, 3), (9, 2, 4)):
        said = storage_report(BIG.model_copy(update={"checkpoint": checkpoint}), 1, commits, None)
        assert said["commits_kept"] == kept and held * size <= said["run_bytes"] < (held + 0.1) * size


def test_storage_of_a_real_run(tiny, tmp_path, capsys):
    """Everything that the run has written, on two ranks, is at most what was said, and not far below."""
    config = tiny(train__steps=24, checkpoint__every_steps=4, checkpoint__keep_every=8, train__audit=False)
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert run_ranks(2, train, config) == [DONE] * 2
    commits = [sum(f.stat().st_size for f in c.glob("*.safetensors")) for c in Path(config.run, "steps").glob("*")]
    headers = 200 * 4 * 44  # of the files: a name and a place for each box
    assert all(commit_bytes(config) <= size <= commit_bytes(config) + headers for size in commits)
    said = storage_report(config, 2, 6, Data.open(config, (2,)))
    assert len(commits) <= said["commits_kept"] == 5 and said["commits_made"] == 6
    found = list(Path(config.run).rglob("*"))
    of_commits = sum(f.stat().st_size for f in found if f.is_file() and f.suffix in (".safetensors", ".jsonl"))
    assert 0.4 * said["run_bytes"] < of_commits < 1.3 * said["run_bytes"]
    assert 0.4 * said["run_inodes"] < len(found) < 1.3 * said["run_inodes"]
    stored = [f for f in Path(config.data.url).rglob("*")]
    assert said["dataset"]["inodes"] == pytest.approx(len(stored), abs=5) and not said["dataset"]["estimated"]
    shards = sum(f.stat().st_size for f in stored if f.name.endswith(".tar.zst"))
    assert said["dataset"]["bytes"] == shards == Manifest.load(config.data.url).header.totals["bytes"]
    assert math.isfinite(said["written_bytes"])

    # And the whole report, from a bench file, on the same small data.
    assert main(["plan", str(file), "--nodes", "2", "--json"]) == 0
    flops = json.loads(capsys.readouterr().out)["data"]["flops_a_step"]
    measured = bench(tmp_path, flops_a_step=flops)
    words = ["plan", str(file), "--bench", measured, "--nodes", "2", "--failures", "24", "--detect", "5"]
    assert main([*words, "--restart", "10", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["time"]["seconds_a_step"] == 0.5 and plan["assumed"]["detect_seconds"]["value"] == 5
    assert plan["goodput"]["expected"] < 1 and plan["storage"]["commit_bytes"] == commit_bytes(config)
