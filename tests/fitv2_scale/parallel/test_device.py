"""Which device a rank computes on, on a machine with GPUs that is not here."""

import os
import socket
from unittest.mock import Mock

import pytest
import torch

from fitv2_scale.parallel import device
from fitv2_scale.parallel.device import (
    gpu_view,
    hide_gpus,
    own_device,
    sees_too_few_gpus,
    torch_without_cuda,
    unusable_gpu,
)
from tests.support.fake_cuda import FakeCuda

UNUSABLE = (
    f"torch {torch.__version__} is built for CUDA 13.0 and cannot use the GPUs of this machine, whose NVIDIA driver is "
    '470.82.01: CUDA says "The NVIDIA driver on your system is too old (found version 11040)"; install a newer driver '
    "or a torch for an older CUDA, see that the container or job may use the GPUs, or set "
    'CUDA_VISIBLE_DEVICES="" to compute on the CPU'
)


@pytest.fixture
def environment(monkeypatch) -> pytest.MonkeyPatch:
    """Without what a launcher or a shell may have set."""
    for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "SLURM_JOB_ID"):
        monkeypatch.setenv(name, "")  # so that it is as before in the end, whatever the code sets
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    "gpus,size,local,variables,too_few",
    [
        (1, 2, "2", {}, True),
        (1, 2, None, {}, True),  # a launcher that does not say how many are on this machine
        (3, 4, "4", {}, True),
        (2, 2, "2", {}, False),
        (0, 2, "2", {}, False),
        (1, 1, "1", {}, False),
        (1, 4, "2", {}, False),  # two machines, and one name for both
        (1, 2, "2", {"SLURM_JOB_ID": "7"}, False),
    ],
)
def test_where_there_are_too_few_gpus(environment, tmp_path, gpus, size, local, variables, too_few):
    cuda = FakeCuda(gpus).install(tmp_path, environment.setattr)
    for name, value in ({"LOCAL_WORLD_SIZE": local} if local else {}).items() | variables.items():
        environment.setenv(name, value)
    assert sees_too_few_gpus(size) == too_few
    assert cuda.begun is None  # else it would be too late to hide them


def test_the_sentence_about_too_few_gpus(environment, tmp_path):
    FakeCuda(3).install(tmp_path, environment.setattr)
    said = "this machine has 3 GPUs for 5 ranks: all compute on the CPU; start one rank for each GPU to use them"
    assert hide_gpus(5) == said and os.environ["CUDA_VISIBLE_DEVICES"] == ""
    environment.setenv("CUDA_VISIBLE_DEVICES", "2")
    said = "this machine has 1 GPU for 2 ranks: all compute on the CPU; start one rank for each GPU to use it"
    assert hide_gpus(2) == said


def test_views_differ_by_machine_gpus_ranks_and_job(environment, tmp_path):
    FakeCuda(2).install(tmp_path, environment.setattr)
    views = [gpu_view(), gpu_view()]
    assert views[0] == views[1]
    environment.setenv("CUDA_VISIBLE_DEVICES", "0")
    views.append(gpu_view())
    environment.setenv("CUDA_VISIBLE_DEVICES", "1")
    views.append(gpu_view())
    environment.setenv("SLURM_JOB_ID", "7")
    views.append(gpu_view())
    environment.setenv("LOCAL_WORLD_SIZE", "4")
    views.append(gpu_view())
    environment.setattr(torch.cuda, "device_count", lambda: 8)
    views.append(gpu_view())
    environment.setattr(socket, "gethostname", lambda: "another")
    assert len({*views, gpu_view()}) == 7


def test_a_rank_too_many_says_so_before_it_touches_a_gpu(environment, tmp_path):
    touched = []
    FakeCuda(2).install(tmp_path, environment.setattr)
    environment.setattr(torch.cuda, "set_device", touched.append)
    environment.setenv("LOCAL_RANK", "1")
    assert own_device() == (torch.device("cuda", 1), None) and touched == [torch.device("cuda", 1)]
    environment.setenv("LOCAL_RANK", "2")
    mine, error = own_device()
    assert mine.type == "cpu" and len(touched) == 1
    assert str(error) == "rank 2 of its node sees 2 GPUs: start a rank for each GPU, not more"


@pytest.mark.parametrize(
    "visible,complains",
    [
        (None, True),
        ("0,1", True),
        ("GPU-8f2", True),
        ("MIG-1a", True),
        ("", False),
        ("-1", False),
        ("NoDevFiles", False),
    ],
)
def test_a_driver_that_torch_cannot_use(environment, tmp_path, visible, complains):
    FakeCuda(1, driver=False).install(tmp_path, environment.setattr)
    if visible is not None:
        environment.setenv("CUDA_VISIBLE_DEVICES", visible)
    error = unusable_gpu()
    assert (error is not None) == complains and str(error) == (UNUSABLE if complains else "None")
    assert torch_without_cuda() is None


def test_what_is_no_fault_of_a_driver(environment, tmp_path):
    FakeCuda(1).install(tmp_path, environment.setattr)
    assert unusable_gpu() is None  # it can be used
    FakeCuda(1, driver=False).install(tmp_path, environment.setattr)
    environment.setattr(device, "DRIVER_FILE", tmp_path / "none")
    environment.setattr(device, "_FIRST_GPU", tmp_path / "nvidia0")
    assert unusable_gpu() is None  # there is no GPU
    (tmp_path / "nvidia0").touch()
    assert "whose NVIDIA driver is of unknown version" in str(unusable_gpu())
    environment.setattr(
        torch.cuda, "init", Mock(side_effect=RuntimeError("Unexpected error. Error 802: system not yet initialized"))
    )
    assert 'CUDA says "Error 802: system not yet initialized";' in str(unusable_gpu())


def test_a_torch_without_cuda_says_that_it_does_not_use_the_gpu(environment, tmp_path):
    FakeCuda(0).install(tmp_path, environment.setattr)
    environment.setattr(torch.version, "cuda", None)
    assert torch_without_cuda() == (
        f"torch {torch.__version__} is built without CUDA, so it computes on the CPU though this machine has an NVIDIA "
        'GPU: install a CUDA build of torch to use it, or set CUDA_VISIBLE_DEVICES="" to say that the CPU is meant'
    )
    assert unusable_gpu() is None
    environment.setenv("CUDA_VISIBLE_DEVICES", "")
    assert torch_without_cuda() is None
