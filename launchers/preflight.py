"""`fitv2 doctor`: checks whether this machine, or all nodes of this job, are fit for training. It takes seconds.

Started by itself it checks this machine; under torchrun or `fitv2 submit -- doctor CONFIG` it checks every node and
compares them. Each job of a chain does that too, in all its ranks, before it trains.
"""

import os
import platform
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from data_sharding.errors import UserError
from data_sharding.format.manifest import Manifest
from data_sharding.plan.size_presets import is_preset
from data_sharding.storage.local_store import LocalStore
from data_sharding.storage.open_store import open_store
from data_sharding.storage.retry import RetryPolicy
from data_sharding.stream.frames import FrameReader
from fitv2_scale.config.schema import Config
from fitv2_scale.parallel.agreement import agree
from fitv2_scale.parallel.device import device_model, torch_without_cuda, unusable_gpu
from fitv2_scale.parallel.rank_facts import config_facts
from fitv2_scale.parallel.world import World, join
from fitv2_scale.run.provenance import installed
from launchers.compiler_check import check_compiler, check_deepspeed

_USED_BYTES = 2 << 30  # of a GPU before training; more means that another process uses it
_TEMPORARY_BYTES = 1 << 30
_CLOCK_SECONDS = 5.0  # a larger difference between clocks spoils the times of journals and logs
_REDUCED_BYTES = 64 << 20


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    what: str
    fault: str  # empty: none
    detail: str
    seconds: float


@dataclass(frozen=True)
class CheckReport:
    """The results of all checks."""

    findings: list[Finding]  # the same on all ranks
    own_fault: bool  # whether this rank has a fault; True on all ranks if a check of all together failed

    @property
    def faults(self) -> list[str]:
        return [f"{f.what}: {f.fault}" for f in self.findings if f.fault]


def check_nodes(config: Config | None) -> CheckReport:
    """Runs all checks that apply; those of run and data need ``config``. Collective if there are several ranks."""
    with join(reports_gpu=True) as world:
        agree(world, config_facts(config) if config else {})  # else the ranks would make different checks
        mine = [_finding(what, check) for what, check in _checks(config, world)]
        everyones = world.all_gather(mine)
        merged = [_merge(row, world) for row in zip(*everyones, strict=True)]
        own_fault = any(f.fault for f in mine)
        if world.size > 1 and not any(f.fault for f in merged):
            merged += [_finding("nodes alike", lambda: _alike(world)), _finding("collectives", lambda: _reduce(world))]
            own_fault = any(f.fault for f in merged)
        return CheckReport(merged, own_fault)


def to_text(findings: list[Finding]) -> str:
    width = max(len(f.what) for f in findings)
    return "\n".join(
        f"{'FAULT' if f.fault else 'ok   '}  {f.what:<{width}}  {f.seconds:6.2f} s  {f.fault or f.detail}"
        for f in findings
    )


def _checks(config: Config | None, world: World) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "packages", lambda: ", ".join(f"{name} {version}" for name, version in installed().items() if version)
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    yield "GPU", lambda: _gpu(world.device)
    yield "compiler", lambda: check_compiler(config.layout if config else None, world.device.type == "cuda")
    if config and config.layout.engine == "zero3":
        yield "DeepSpeed", check_deepspeed
    yield "temporary folder", _temporary
    if config and config.run:
        yield "run folder", lambda: _run_folder(config.run, world)
    if config:
        for url in config.data.urls:
            if not is_preset(url):
                yield "data", lambda url=url: "" if local_rank else _data(url, config.data.cache_dir)  # once a node


def _finding(what: str, check: Callable[[], str]) -> Finding:
    begun = time.perf_counter()
    fault, detail = "", ""
    try:
        detail = check()
    except Exception as error:  # of any kind: it belongs in the report
        fault = str(error) or repr(error)
    return Finding(what, fault, detail, time.perf_counter() - begun)


def _merge(row: tuple[Finding, ...], world: World) -> Finding:
    """One line for all ranks: the time of the slowest, and the faults of each."""
    if world.size == 1:
        return row[0]
    faults = [f"rank {rank}: {f.fault}" for rank, f in enumerate(row) if f.fault]
    return Finding(row[0].what, "; ".join(faults), row[0].detail, max(f.seconds for f in row))


def _gpu(device: torch.device) -> str:
    if device.type == "cpu":
        if error := unusable_gpu():
            raise error
        return torch_without_cuda() or "none is used; training will use the CPU"
    index = device.index
    free, total = torch.cuda.mem_get_info(index)
    used = total - free - torch.cuda.memory_reserved(index)
    if used > _USED_BYTES:
        raise UserError(f"{used / 2**30:.1f} GiB of GPU {index} are in use: another process runs on it")
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    if len(names) > 1:
        raise UserError(f"this node has GPUs of several types: {', '.join(sorted(names))}")
    return f"{torch.cuda.device_count()} x {names.pop()}, {free / 2**30:.0f} GiB free on GPU {index}"


def _temporary() -> str:
    folder = tempfile.gettempdir()
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"x" * 4096)
        file.flush()
        os.fsync(file.fileno())
    free = shutil.disk_usage(folder).free
    if free < _TEMPORARY_BYTES:
        raise UserError(f"{folder} has only {free / 2**30:.2f} GiB left: set TMPDIR to a larger one")
    return f"{folder}, {free / 2**30:.0f} GiB free"


def _run_folder(url: str, world: World) -> str:
    """Each rank creates an object, fails to create it again, and reads that of the next rank; then all are deleted."""
    folder = f"doctor-{world.broadcast(secrets.token_hex(4))}"
    faults: list[Exception] = []
    skew = 0.0

    def write() -> None:
        nonlocal skew
        store.create(f"{folder}/{world.rank}", str(world.rank).encode())
        skew = _clock_skew(store, f"{folder}/{world.rank}")
        try:
            store.create(f"{folder}/{world.rank}", b"again")
        except FileExistsError:
            return
        raise UserError(f"{url}: a conditional create overwrites an existing object on this storage")

    def read() -> None:
        other = (world.rank + 1) % world.size
        if (found := store.read(f"{folder}/{other}")) != str(other).encode():
            raise UserError(f"{url} returns {found!r} for the object that rank {other} wrote")

    def delete() -> None:
        if world.is_first:
            store.delete_tree(folder)

    store = open_store(url)
    for stage in (write, read, delete):
        try:
            stage()
        except Exception as error:  # if this rank raised here, the others would wait for it
            faults.append(error)
        world.all_gather(None)
    if faults:
        raise faults[0]
    if abs(skew) > _CLOCK_SECONDS:
        raise UserError(f"the clock of {socket.gethostname()} differs by {skew:+.0f} s from the file server's")
    return f"{url}: every rank reads what another rank wrote; clock {skew:+.1f} s"


def _clock_skew(store: Any, path: str) -> float:
    """Seconds that this node's clock is ahead of the file server's; 0 for a run on S3."""
    if not isinstance(store, LocalStore):
        return 0.0
    return time.time() - os.stat(store.path(path)).st_mtime


def _data(url: str, cache: str) -> str:
    manifest = Manifest.load(url, cache)
    FrameReader(RetryPolicy(deadline=20.0)).read(manifest, 0)
    return f"{url}: {len(manifest.sample_id)} images, the first frame is intact"


def _alike(world: World) -> str:
    versions = world.all_gather({"machine": platform.machine(), "device": device_model(world.device), **installed()})
    times = world.all_gather(time.time())
    for key in versions[0]:
        if len(values := {str(v[key]) for v in versions}) > 1:
            raise UserError(f"nodes differ in {key}: {', '.join(sorted(values))}")
    return f"{world.size} ranks, the same versions; answers within {max(times) - min(times):.1f} s"


def _reduce(world: World) -> str:
    values = torch.ones(_REDUCED_BYTES // 4, device=world.device)
    for _ in range(2):  # the first connects
        world.all_gather(None)
        begun = time.perf_counter()
        dist.all_reduce(values)
        total = values[0].item()
        seconds = time.perf_counter() - begun
    if total != world.size**2:
        raise UserError(f"an all-reduce gives {total} instead of {world.size**2}")
    moved = 2 * (world.size - 1) / world.size * _REDUCED_BYTES
    return f"all-reduce of {_REDUCED_BYTES >> 20} MiB at {moved / seconds / 1e9:.2f} GB/s a rank"


def as_report(findings: list[Finding]) -> list[dict[str, Any]]:
    return [asdict(finding) for finding in findings]
