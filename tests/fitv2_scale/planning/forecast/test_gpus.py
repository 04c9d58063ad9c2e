"""One GPU for a whole plan: by name, of a measured step, or that of the predictions."""

import json

import pytest

from data_sharding.errors import UserError
from fitv2_scale.bench.kernels.gpus import GPUS as PREDICTED
from fitv2_scale.cli.__main__ import main
from fitv2_scale.planning.forecast.assumptions import Assumptions
from fitv2_scale.planning.forecast.gpus import data_sheet, known_gpu
from fitv2_scale.train.metrics import meter
from tests.support.repository import ROOT

PLAN = ["plan", str(ROOT / "configs/fitv2_3b2.yaml"), "data.url=preset:imagenet256"]


def sheet(assumptions: Assumptions) -> tuple[str, float, float, float]:
    return (
        assumptions.gpu,
        assumptions.peak_tflops.value,
        assumptions.gpu_bytes.value,
        assumptions.nvlink.value,
    )


def test_by_name():
    assert sheet(Assumptions()) == sheet(Assumptions().on_gpu(None)) == ("H200", 989, 141e9, 450e9)
    assert sheet(Assumptions().on_gpu("H100")) == ("H100", 989, 80e9, 450e9)
    assert sheet(Assumptions().on_gpu("A100")) == ("A100", 312, 80e9, 300e9)
    for figure in ("peak_tflops", "gpu_bytes", "nvlink"):
        assert "A100 SXM" in getattr(Assumptions().on_gpu("A100"), figure).source


def test_one_that_is_not_known(capsys):
    assert main([*PLAN, "--gpu", "B200"]) == 2
    assert capsys.readouterr().err == "fitv2: --gpu B200 is not known: give H200, H100, A100\n"


@pytest.mark.parametrize(
    ("machine", "gpu"),
    [("NVIDIA H200", "H200"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA A100-SXM4-80GB", "A100"), ("CPU", None)],
)
def test_by_the_name_that_torch_gives(machine, gpu, tmp_path, monkeypatch):
    assert known_gpu(machine) == gpu
    step = {"ranks": 1, "seconds_a_step": {"median": 0.5}, "images_per_second": 24.0, "fill": 0.8,
            "flops_a_step": 4e9, "peak_tflops": None}  # fmt: skip
    file = tmp_path / "step.json"
    file.write_text(json.dumps(step | {"machine": machine}))
    measured = Assumptions().with_benchmarks([str(file)], 1)
    assert measured.on_gpu(None).gpu == (gpu or "H200")
    assert measured.on_gpu(gpu or "A100").gpu == (gpu or "A100")
    if gpu:
        other = {"H200": "H100"}.get(gpu, "H200")
        with pytest.raises(UserError, match=f"--gpu {other}: .*step.json was measured on {machine}; leave one"):
            measured.on_gpu(other)
    monkeypatch.setattr(meter.torch.cuda, "get_device_name", lambda device: machine)
    peaks = {"H200": 989.0, "H100": 989.0, "A100": 312.0, None: None}
    assert meter.known_peak(meter.torch.device("cuda")) == peaks[gpu]


def test_the_gpus_of_the_kernels_are_in_the_same_table():
    for name, gpu in PREDICTED.items():
        assert gpu.peak_flops.value == 1e12 * data_sheet(name).peak_tflops and known_gpu(gpu.name) == name


@pytest.mark.parametrize(
    ("words", "gpu", "gib", "fits"), [([], "H200", 131.3, True), (["--gpu=H100"], "H100", 74.5, False)]
)
def test_memory_is_judged_by_the_gpu_whose_time_it_is(words, gpu, gib, fits, capsys):
    """FiTv2-3B/2 takes 110 GiB of one GPU."""
    assert main([*PLAN, *words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["gpu"] == gpu and report["memory"]["fits"] == report["nodes"]["tried"][0]["fits"] == fits
    assert report["memory"]["gpu_bytes"] == report["assumed"]["gpu_bytes"]["value"]
    assert main([*PLAN, *words]) == 0
    text = capsys.readouterr().out
    assert f"GiB on a GPU, {'of' if fits else 'more than'} the {gib} of an {gpu};" in text
    assert ("predicted by `fitv2 bench kernels` for one NVIDIA H200" in text) == fits
    assert ("none is predicted for this network on an H100" in text) != fits
    other = {"H200": "H100 SXM", "H100": "H200 SXM"}[gpu]
    assert other not in text and text.count(f"{gpu} SXM, ") == 3
