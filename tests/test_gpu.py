"""The measurements on a GPU, as far as a CPU can try them: `tests/gpu/`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fitv2_scale.config.load import load_config
from tests.gpu.jobs import Job, parts
from tests.gpu.predictions import PREDICTIONS, Prediction
from tests.gpu.products import token_products
from tests.gpu.report import found, measured, to_markdown
from tests.gpu.results import merge, read, write
from tests.gpu.runner import run
from tests.gpu.step_profile import kind_of, summary
from tests.support.repository import ROOT
from tests.support.waiting import wait

HOLDS_ON = "import subprocess, sys, time; subprocess.Popen(['sleep', '{}']); time.sleep(600)"


def outcome(status: str, result: object = None) -> dict:
    return {"status": status, "seconds": 1.0, "command": "", "result": result}


def step(seconds: float, **changes) -> dict:
    report = {"seconds_a_step": {"median": seconds}, "images_per_second": 256 / seconds, "mfu": 0.5}
    return outcome("ok", report | {"peak_bytes": None, "planned_peak_bytes": None, "syncs_in_a_step": 0} | changes)


@pytest.mark.parametrize(
    ("name", "hidden", "mlp"), [("fitv2_3b2", 2304, 6144), ("fitv2_xl2", 1152, 3072), ("fitv2_b2", 768, 2048)]
)
def test_the_shapes_of_a_block_s_products(name, hidden, mlp):
    assert token_products(load_config(f"configs/{name}.yaml").model) == {
        "attn.qkv": (hidden, 3 * hidden),
        "attn.proj": (hidden, hidden),
        "mlp.fc1_g": (hidden, mlp),
        "mlp.fc1_x": (hidden, mlp),
        "mlp.fc2": (mlp, hidden),
    }


def test_kernels_are_told_apart_by_their_names():
    by_kind = {
        "attention": [
            "void flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<>",
            "flash_fwd_kernel",
            "flash_bwd_convert_dq",
        ],
        "copies": ["Memcpy HtoD (Pinned -> Device)", "chunk_cat_cuda_kernel<float, c10::BFloat16>"],
        "compiled elementwise": ["triton_poi_fused_silu_mul_3", "triton_red_fused_native_layer_norm_0"],
        "optimizer": ["multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>"],
        "products": ["nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NTT", "sm90_xmma_gemm_bf16bf16_bf16f32", "aten::addmm"],
        "other": ["void at::native::vectorized_elementwise_kernel<4, MulFunctor>"],
    }
    by_kind["copies"] += ["multi_tensor_apply_kernel<TensorListMetadata<2>, CopyFunctor<>>", "CatArrayBatchedCopy"]
    for kind, names in by_kind.items():
        assert {name: kind_of(name) for name in names} == dict.fromkeys(names, kind)


def test_shares_are_of_the_time_on_the_device():
    told = summary([("nvjet_a", 3.0, 2), ("gemm_b", 3.0, 1), ("triton_c", 1.5, 9), ("unknown", 0.5, 1)])
    assert told["ms"] == 8.0
    shares = {"products": 75.0, "compiled elementwise": 18.75, "other": 6.25}
    assert told["percent"] == {"attention": 0, "copies": 0, "optimizer": 0} | shares
    assert [k["name"] for k in told["kernels"]] == ["nvjet_a", "gemm_b", "triton_c", "unknown"]


def test_what_was_measured_stays_whatever_a_later_try_gives():
    first = {"a": outcome("ok", 1), "b": outcome("stopped"), "c": outcome("ok", 3)}
    later = {"a": outcome("failed with 1"), "b": outcome("ok", 2), "c": outcome("ok", 4), "d": outcome("left out")}
    merged = merge(first, later)
    assert {name: (o["status"], o["result"]) for name, o in merged.items()} == {
        "a": ("ok", 1),
        "b": ("ok", 2),
        "c": ("ok", 4),
        "d": ("left out", None),
    }
    assert merge({"a": outcome("stopped")}, {"a": outcome("left out")})["a"]["status"] == "left out"


def test_a_job_that_fails_or_hangs_does_not_end_the_others(tmp_path):
    mark = str(4_000_000 + os.getpid())  # seconds to sleep, by which what the job started is known
    jobs = [
        Job("fails", 30, ("-c", "print('{}'); raise SystemExit(3)")),
        Job("hangs", 1, ("-c", HOLDS_ON.format(mark))),
        Job("says nothing", 30, ("-c", "print('no JSON')")),
        Job("works", 30, ("-c", "print('{\"found\": 1}')")),
        Job("comes too late", 3000, ("-c", "print(1)")),
    ]
    write(tmp_path, {"works": outcome("stopped"), "of another part": outcome("ok", 7)})
    assert not run(jobs, tmp_path, 300)
    assert {name: (o["status"], o["result"]) for name, o in read(tmp_path).items()} == {
        "of another part": ("ok", 7),
        "fails": ("failed with 3", {}),
        "hangs": ("stopped", None),
        "says nothing": ("printed no JSON", None),
        "works": ("ok", {"found": 1}),
        "comes too late": ("left out", None),
    }
    assert "no JSON" in (tmp_path / "log.txt").read_text()
    wait("what the job started to be gone", lambda: mark.encode() not in b"".join(command_lines()))
    assert run(jobs[3:4], tmp_path, 300)


def command_lines() -> list[bytes]:
    lines = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(process.read_bytes())
        except OSError:  # it has ended
            continue
    return lines


def test_tests_are_counted(tmp_path):
    file = tmp_path / "test_three.py"
    file.write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\n@pytest.mark.skip\ndef test_c(): pass\n"
        "@pytest.fixture\ndef broken(): 1 / 0\ndef test_d(broken): pass\n"
    )
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", str(file))
    assert not run([Job("three", 60, words, is_pytest=True)], tmp_path, 100)
    told = read(tmp_path)["three"]
    assert told["status"] == "failed with 1"
    names = {what: [name.rpartition("::")[2] for name in told["result"][what]] for what in ("failed", "skipped")}
    assert (told["result"]["passed"], names) == (1, {"failed": ["test_b", "test_d"], "skipped": ["test_c"]})
    (row,) = (line for line in to_markdown(read(tmp_path)).splitlines() if line.startswith("| three | failed with 1 |"))
    assert re.search(r"\| 1 passed, 1 skipped; failed: \S+::test_b, \S+::test_d \|$", row)


def test_the_page_has_measured_beside_predicted():
    results = {
        "machine": outcome("ok", {"torch": "2.11.0", "device": "NVIDIA H200"}),
        "3B/2, 256 images": step(2.0, peak_bytes=120e9, planned_peak_bytes=100e9, mfu=0.53),
        "XL/2, 256 images": step(1.0, mfu=0.34),
        "B/2, 256 images": outcome("stopped"),
    }
    lines = to_markdown(results).splitlines()
    for line in (
        "torch 2.11.0, device NVIDIA H200.",
        "| a step of 3B/2 with 256 images, s | 1.95 - 2.25 | 2 |",
        "| its MFU | 0.44 - 0.51 | **0.53** |",
        "| its peak over the planned one | 0.95 - 1.05 | **1.2** |",
        "| MFU of XL/2 with 256 images | 0.35 | 0.34 |",  # 3 % from a single figure
        "| norm, AdamW and EMA of 3B/2, ms | 34 - 40 | - |",
        "| 3B/2, 256 images | 2 | 128 | 0.53 | 120 | 100 | 0 |",
        "| B/2, 256 images | stopped | 1 |  |",
    ):
        assert line in lines, line
    assert "dry run" in to_markdown({"machine": outcome("ok", {"device": "CPU"})})


def test_a_range_may_be_open():
    predicted = Prediction("rate", ("a", "rate"), None, 520)
    assert measured({"a": outcome("ok", {"rate": 600})}, predicted) == 600
    assert measured({"a": outcome("stopped")}, predicted) is None
    assert measured({}, predicted) is None


def steps(dry: bool) -> list[list[str]]:
    """The config and the overrides of each step that is measured."""
    jobs = [job for part in parts(dry).values() for job in part]
    words = [[w for w in job.words if w.startswith("configs/") or "=" in w] for job in jobs]
    return [found for found in words if found]


@pytest.mark.parametrize("dry", [False, True])
def test_every_step_has_a_config_that_can_be_read(dry):
    models = [load_config(config, overrides).model for config, *overrides in steps(dry)]
    assert {m.depth for m in models} == ({1} if dry else {15, 36, 40})


def test_every_part_ends_within_ten_minutes_and_each_prediction_has_its_job():
    jobs = parts(dry=False)
    names = [job.name for part in jobs.values() for job in part if job.name != "machine"]
    assert len(names) == len({*names})  # results are found by them
    assert {p.path[0] for p in PREDICTIONS} <= {*names}
    assert all(sum(job.seconds for job in part) <= 700 for part in jobs.values())  # at most; it stops after 550


@pytest.mark.parametrize("part", ["1", "2", "3", "4"])
def test_a_dry_run(part, tmp_path):
    command = ["bash", "tests/gpu.sh", "--dry-run", part, "--out", str(tmp_path), "--seconds", "3000"]
    env = os.environ | {"FITV2_PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "log.txt").read_text()
    results = json.loads((tmp_path / "results.json").read_text())
    assert {name: o["status"] for name, o in results.items()} == {job.name: "ok" for job in parts(dry=True)[part]}
    assert (tmp_path / "results.md").read_text() == to_markdown(results)
    for prediction in PREDICTIONS:
        for path in filter(None, (prediction.path, prediction.over)):
            job, *keys, last = ["48" if key == "15752" else key for key in path]  # tokens of the only pack
            assert job not in results or last in found(results, [job, *keys]), prediction.figure


def test_without_a_gpu_it_says_so(tmp_path):
    env = os.environ | {"FITV2_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(["bash", "tests/gpu.sh", "1"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "torch sees no GPU here: start this on a machine with one, or try it with --dry-run\n"


def test_results_of_several_folders_become_one(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, {name: outcome("ok", 1)})
    command = [
        "bash",
        "tests/gpu.sh",
        "report",
        "--out",
        str(tmp_path / "all"),
        str(tmp_path / "a"),
        str(tmp_path / "b"),
    ]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"FITV2_PYTHON": sys.executable}, check=True)
    assert {*read(tmp_path / "all")} == {"a", "b"}
    assert "| b | ok | 1 |  |" in (tmp_path / "all" / "results.md").read_text().splitlines()
