"""What the ranks of a command compare before they begin (see ``agreement``): config, software, data."""

import argparse
import os
import platform
from typing import Any

import torch

from fitv2_scale.config.layout import Layout
from fitv2_scale.config.schema import Config
from fitv2_scale.data import Data
from fitv2_scale.parallel.agreement import Facts
from fitv2_scale.parallel.device import device_model
from fitv2_scale.parallel.world import World
from fitv2_scale.run.differences import flatten
from fitv2_scale.run.provenance import code_digest, installed

# All keys of the config must be the same on all ranks, except these.
PER_NODE = {
    "data.url": "a node may have a copy of its own; the digests of the datasets are compared",
    "validation.url": "as data.url",
    "sampling.vae": "as data.url; the digest of its weights is compared where it is read",
    "data.cache_dir": "a folder on the node's own disk; whether the nodes share the work by it is compared",
    "data.cache_disk_gib": "as data.cache_dir",
}

# Variables that change what collectives or kernels compute, or that have to be the same for NCCL not to hang. Those
# that name a node's own devices (NCCL_SOCKET_IFNAME, NCCL_IB_HCA, …) may differ.
_VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG",
    "CUBLASLT_WORKSPACE_SIZE",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_BLAS_PREFER_CUBLASLT",
    "TORCH_COMPILE_DISABLE",
    "TORCHDYNAMO_DISABLE",
    "TORCH_LINEAR_FLATTEN_3D",
    "NCCL_ALGO",
    "NCCL_PROTO",
    "NCCL_BUFFSIZE",
    "NCCL_COLLNET_ENABLE",
    "NCCL_CUMEM_ENABLE",
    "NCCL_MAX_NCHANNELS",
    "NCCL_MIN_NCHANNELS",
    "NCCL_NTHREADS",
    "NCCL_NVLS_ENABLE",
    "NCCL_SHM_DISABLE",
)


def config_facts(config: Config) -> dict[str, Any]:
    """Every key of ``config`` but those of ``PER_NODE``, dotted."""
    return {key: value for key, value in flatten(config.model_dump(mode="json")).items() if key not in PER_NODE}


def command_facts(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of a command line as parsed, by their names there."""
    shown = {name: value for name, value in vars(args).items() if not callable(value)}
    return {f"--{name.replace('_', '-')}": value for name, value in shown.items()}


def software_facts(device: torch.device) -> dict[str, Any]:
    """Our code, the packages that results may depend on, the model of this rank's ``device``, and variables of the
    environment. A node whose driver is broken has no GPU; and copies of the state that other models compute need not
    have the same bits."""
    packages = {f"version of {name}": version for name, version in installed().items()}
    variables = {f"${name}": os.environ.get(name) for name in _VARIABLES}
    versions = {"digest of the code": code_digest(), "version of python": platform.python_version()}
    facts = {"device": device_model(device)} | versions
    return facts | packages | variables


def read_data(config: Config, world: World) -> tuple[tuple[Layout, Data], Facts]:
    """The layout and the data as this rank reads them, for ``read_alike``. A dataset's digest covers all of it: images,
    labels, classes, codec. Raises UserError."""
    layout = config.layout.over(world.size, len(set(world.hosts)))
    data = Data.open(config, layout.nodes(world.hosts))
    datasets = {f"digest of dataset {i}": m.digest for i, m in enumerate(data.plan.manifests)}
    # How the steps are divided follows from these.
    divided = {"plan": data.plan.hash, "data-parallel ranks that share data": data.nodes, "pack shapes": data.shapes}
    return (layout, data), datasets | divided
