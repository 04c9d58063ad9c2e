"""`fitv2 bench kernels`, from a config to its report."""

import json
import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from data_sharding.errors import UserError
from fitv2_scale.bench.kernels import fake_gpu
from fitv2_scale.bench.kernels.counts import CompiledBlock, Kernel, OuterStep, Workload
from fitv2_scale.bench.kernels.gpus import GPUS, gpu_named
from fitv2_scale.bench.kernels.predict import add_to_table, measure, workload
from fitv2_scale.bench.kernels.report import MEANING, to_text
from fitv2_scale.bench.kernels.roofline import predict
from fitv2_scale.cli.__main__ import run_command
from fitv2_scale.config.load import load_config
from fitv2_scale.config.model import ModelConfig
from fitv2_scale.data import Data
from tests.support.repository import ROOT

CONFIG = str(ROOT / "configs" / "fitv2_b2.yaml")
DATA = "data.url=preset:imagenet256"


@pytest.mark.parametrize(
    "override",
    ["layout.engine=zero3", "layout.tensor=2", "layout.precision=fp32", "layout.compile=false"],
)
def test_what_it_cannot_predict_is_refused(override):
    with pytest.raises(UserError, match=override):
        measure(load_config(CONFIG, [DATA, override]), "H200", ranks=2)


def test_fp8_that_this_torch_cannot_compile_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    with pytest.raises(UserError, match=r"^layout.precision=fp8 needs torch 2.13 or newer, not 2.11.0\+cu130"):
        measure(load_config(CONFIG, [DATA, "layout.precision=fp8", "layout.pad_to_multiple_of=16"]), "H200")


def test_attention_by_flash4_is_taken_to_be_twice_as_fast():
    """Its FLOPs, not what the operator copies: of the report's own seconds, by its own rates."""
    two, four = (
        measure(load_config(CONFIG, [DATA, "model.depth=1", f"layout.attention={kernels}"]), "H200", tokens=1024)
        for kernels in ("auto", "flash4")
    )
    for name, rate in (("attention_forward_flops", 200e12), ("attention_backward_flops", 150e12)):
        assert [found["assumed"][name]["value"] for found in (two, four)] == [rate, 2 * rate]
    seconds = [found["prediction"]["seconds_by_part"]["attention"] for found in (two, four)]
    assert 0.5 < seconds[1] / seconds[0] < 1
    assert two["block"] == four["block"]


def test_an_unknown_gpu():
    with pytest.raises(UserError, match="only for H200"):
        measure(load_config(CONFIG, [DATA]), "TPU")


def test_a_torch_that_cannot_pretend_says_so(monkeypatch):
    """One that asks the driver itself, as torch 2.11 did when it made a tensor without values."""

    def ask_the_driver():
        raise RuntimeError("Found no NVIDIA driver on your system.")

    monkeypatch.setattr(fake_gpu, "_in_cpp", nullcontext)
    monkeypatch.setattr(fake_gpu, "_in_python", lambda gpu: [])
    monkeypatch.setattr(fake_gpu, "_gradient_on_gpu", ask_the_driver)
    message = f"torch {torch.__version__} cannot compile for a GPU that is not there"
    with pytest.raises(UserError, match=re.escape(message)), fake_gpu.fake_gpu(gpu_named("H200")):
        pass


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


REPORT = {
    "gpu": "A GPU",
    "torch": "2",
    "workload": {"tokens": 512},
    "assumed": {"peak_flops": {"value": 2e14}},
    "block": {
        "forward": {"triton_kernels": 3, "triton_bytes_a_token": 10.0},
        "backward": {"triton_kernels": 5, "triton_bytes_a_token": 20.0},
    },
    "prediction": {
        "mfu": 0.25,
        "seconds": 1.5,
        "seconds_by_part": {"products": 1.5},
        "host_seconds": 0.5,
        "tokens_per_second": 7.0,
    },
}


def test_a_table_of_predictions(tmp_path):
    file = tmp_path / "table.json"
    for config, mfu in ((CONFIG, 0.25), (CONFIG.replace("b2", "xl2"), 0.3), (CONFIG, 0.4)):
        found = REPORT | {"prediction": REPORT["prediction"] | {"mfu": mfu}}
        add_to_table(str(file), load_config(config, [DATA]), found)
    rows = json.loads(file.read_text())
    assert [(row["model"]["hidden"], row["mfu"]) for row in rows] == [(1152, 0.3), (768, 0.4)]
    assert rows[0]["peak_tflops"] == 200 and rows[0]["triton_kernels"] == [3, 5]
    assert rows[0]["triton_bytes_a_token"] == [10.0, 20.0] and rows[0]["tokens"] == 512


def test_what_is_no_table(tmp_path):
    (tmp_path / "table.json").write_text("[1]")
    for name in ("table.json", "nowhere/table.json"):
        with pytest.raises(UserError, match="is no table of predictions that can be written"):
            add_to_table(str(tmp_path / name), load_config(CONFIG, [DATA]), REPORT)
    with pytest.raises(UserError, match="leave --ranks out"):
        run_command(["bench", "kernels", CONFIG, "--ranks", "2", "--table", "table.json"])
    with pytest.raises(UserError, match="--ranks 3 do not divide evenly among --nodes 2"):
        run_command(["bench", "kernels", CONFIG, "--ranks", "3", "--nodes", "2"])


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
    units = {name: rate["unit"] for name, rate in report["assumed"].items()}
    assert units["product_flops"] == "FLOP/s" and units["copy_bytes"] == "bytes/s" and units["block_seconds"] == "s"
    assert units["flash4"] == "times"
    assert_the_text_explains(report)


def assert_the_text_explains(report: dict):
    """One block of B/2 on 512 tokens: the GPU is done before the host has started its operations."""
    assert report["decided_by"] == "host"
    result, text = report["prediction"], to_text(report)
    on_gpu = sum(result["seconds_by_part"].values())
    assert on_gpu < result["host_seconds"] == result["seconds"] - result["exposed_seconds"]
    sentence = f"The host decides: it needs {1000 * result['host_seconds']:.1f} ms for FSDP's hooks and to start "
    assert sentence + f"{report['step']['host_operations']:,} operations, which the GPU computes in " in text
    largest = list(result["losses"])[:3]
    assert largest[0] == "the GPU waits for the host"
    assert f"{1000 * result['losses'][largest[0]]:.1f} ms {largest[0]}: the host starts operations more slowly" in text
    for rate in (
        "product_flops 748 TFLOP/s: ", "copy_bytes 3.8 TB/s: ", "kernel_seconds 3 µs: ", "block_seconds 850 µs: ",
        "flash4 2 times: ",
    ):  # fmt: skip
        assert f"assumed   {rate}" in text
    faster = report | {"decided_by": "GPU"}
    assert "The host decides" not in to_text(faster) and "The GPU decides: it computes for " in to_text(faster)


def test_each_loss_has_a_meaning():
    block = CompiledBlock(1, 0, (), (Kernel("mm", "product", 0, (64, 64, 64)),))
    work = Workload(ranks=1, tokens=64, slots=4, max_seqlen=16, packs=1.0, fill=0.9, keys=10.0, flops=1e9)
    model = ModelConfig(depth=2, hidden=192, heads=3, classes=10)
    losses = predict(model, block, OuterStep((), 1), work, GPUS["H200"], lambda computing: 1.0).losses
    assert losses.keys() == MEANING.keys()
