"""`fitv2 bench kernels`, from a config to its report."""

import json

import numpy as np
import pytest

from data_sharding.errors import UserError
from fitv2_scale.bench.kernels.predict import measure, workload
from fitv2_scale.cli.__main__ import run_command
from fitv2_scale.config.load import load_config
from fitv2_scale.data import Data
from tests.support.repository import ROOT

CONFIG = str(ROOT / "configs" / "fitv2_b2.yaml")
DATA = "data.url=preset:imagenet256"


@pytest.mark.parametrize(
    "override", ["layout.engine=zero3", "layout.tensor=2", "layout.precision=fp32", "layout.compile=false"]
)
def test_what_it_cannot_predict_is_refused(override):
    with pytest.raises(UserError, match=override):
        measure(load_config(CONFIG, [DATA, override]), "H200", ranks=2)


def test_an_unknown_gpu():
    with pytest.raises(UserError, match="only for H200"):
        measure(load_config(CONFIG, [DATA]), "TPU")


def test_too_few_slots():
    config = load_config(CONFIG, [DATA])
    with pytest.raises(UserError, match="--slots 3 are too few for 1024 tokens"):
        workload(config, config.layout.over(1), 1, 1, 1024, 3)


def test_the_work_of_a_rank():
    config = load_config(CONFIG, [DATA])
    data = Data.open(config, (2,))
    lengths = np.concatenate([data.plan.step(step).tokens for step in range(data.plan.window_length(0))])
    steps, shape = data.plan.window_length(0), data.shapes[0][-1]
    work = workload(config, config.layout.over(2), 2, 1, None, None)
    assert (work.tokens, work.slots, work.max_seqlen) == (shape.tokens, shape.images, 256)
    # On average a token's image is longer than the mean image.
    assert work.keys == pytest.approx(sum(int(n) ** 2 for n in lengths) / sum(map(int, lengths)))
    assert work.packs * work.tokens * work.fill * 2 == pytest.approx(lengths.sum() / steps, rel=0.02)
    small = workload(config, config.layout.over(2), 2, 1, 1024, 9)
    assert small.packs == -(-lengths.sum() / steps / 2 // 1024)
    assert small.packs * small.fill * 1024 * 2 == pytest.approx(lengths.sum() / steps)


def test_the_whole_command(capsys):
    shape = ["--tokens", "512", "--slots", "4", "--ranks", "8"]
    run_command(["bench", "kernels", CONFIG, DATA, "model.depth=1", "batch.images=16", *shape, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["predicted"] is True and report["gpu"] == "NVIDIA H200"
    assert report["workload"]["packs"] == 1 and report["layout"]["shard"] == 8
    assert report["block"]["graphs"] == 1
    forward = {(p["rows"], p["columns"], p["summed"]): p["calls"] for p in report["block"]["forward"]["products"]}
    assert forward[512, 3 * 768, 768] == 1 and forward[512, 2048, 768] == 2
    assert pytest.approx(report["step"]["optimizer_bytes_a_number"], rel=0.01) == 48
    assert {c["name"] for c in report["step"]["collectives"]} == {"_allgather_base_", "_reduce_scatter_base_"}
    assert 0 < report["prediction"]["mfu"] < 1
    assert all(rate["source"] for rate in report["assumed"].values())
