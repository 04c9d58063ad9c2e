"""`fitv2 submit`: everything that can be wrong is found here, before anything is queued; then a chain begins."""

import json
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import data_sharding
import fitv2_scale
import launchers
from data_sharding.errors import UserError
from data_sharding.plan.size_presets import is_preset
from data_sharding.storage.local_store import LocalStore
from data_sharding.storage.open_store import open_store
from fitv2_scale.config.load import load_config
from fitv2_scale.config.schema import Config
from fitv2_scale.config.slurm import SlurmConfig
from fitv2_scale.run.provenance import SOURCE, source
from fitv2_scale.run.redact import redact
from fitv2_scale.run.run import Run, flatten
from launchers import slurm
from launchers.batch_script import command_script, train_script
from launchers.chain import CHAIN_FILE, Chain, node_count
from launchers.chain_log import LEAST_SIGNAL, ChainLog, signal_seconds
from launchers.control import job_name
from launchers.secret_overrides import to_environment

if TYPE_CHECKING:
    from fitv2_scale.data import Data

_PACKAGES = (data_sharding, fitv2_scale, launchers)


@dataclass(frozen=True)
class Submission:
    """What was queued, or with ``--dry-run`` would be: ``jobs`` is then empty."""

    run: str
    name: str
    nodes: int
    jobs: list[str]
    script: str
    advice: str = ""  # on the number of nodes


def parse_nodes(text: str) -> tuple[int, int]:
    """``4`` or ``2-4``: the fewest and the most nodes of a job. Raises UserError."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 0 < least <= most:
        raise UserError(f"--nodes {text}: give a number as in 4, or the fewest and the most as in 2-4.")
    return least, most


def sweep(config: str, overrides: list[str], axes: list[str]) -> Iterator[list[str]]:
    """The overrides of each combination of the axes ``key=a,b,c``, each with a run of its own below ``run``.

    A value of a whole section, as in model=fitv2_s2,fitv2_b2, is that section of the config of this name in the folder
    of ``config``.
    """
    parsed = [axis.partition("=") for axis in axes]
    for axis, (_, equals, values) in zip(axes, parsed, strict=True):
        if not equals or not values:
            raise UserError(f"--sweep {axis}: give it as key=a,b,c")
    runs = [override.removeprefix("run=") for override in overrides if override.startswith("run=")]
    if not runs:
        raise UserError("--sweep needs run=FOLDER, below which each combination gets a run of its own.")
    for values in product(*(values.split(",") for _, _, values in parsed)):
        pairs = list(zip((key for key, _, _ in parsed), values, strict=True))
        name = "_".join(f"{key.split('.')[-1]}-{value}" for key, value in pairs)
        made = [_section_or_value(config, key, value) for key, value in pairs]
        yield [*made, *overrides, f"run={runs[-1].rstrip('/')}/{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}"]


def _section_or_value(config: str, key: str, value: str) -> str:
    if key not in ("model", "flow", "optimizer", "batch"):
        return f"{key}={value}"
    section = getattr(load_config(str(Path(config).with_name(f"{value}.yaml"))), key)
    return f"{key}={json.dumps(section.model_dump(mode='json'))}"


def submit(config: Config, nodes: str, dry_run: bool, fork_from: str | None = None) -> Submission:
    """Queues a chain of jobs that train, or replaces what is pending of the run's chain. Raises UserError."""
    least, most = parse_nodes(nodes)
    if not config.run:
        raise UserError("give the run's folder as run=FOLDER")
    site = config.slurm
    if not dry_run:
        _check_cluster(site)
        _check_data(config)
    data, parent = _check_training(config, least, most, fork_from)
    usable = len(slurm.usable_nodes(site.partition)) if slurm.available() and not dry_run else most
    count = node_count(usable, least, most)
    url = open_store(config.run).url
    home = _home(site, url) / secrets.token_hex(4)
    known = Run.open(url) if open_store(url).exists("run.json") else None
    told = signal_seconds(known, site.signal_seconds) if known else site.signal_seconds or LEAST_SIGNAL
    if site.walltime_seconds <= told:
        raise UserError(
            f"slurm.walltime={site.walltime} leaves no time to train: {told} s before the limit Slurm asks to save. "
            "Raise it, or set slurm.signal_seconds."
        )
    if dry_run:
        name = job_name(known.id if known else f"{Path(url).name}-new")
        script = train_script(site, name, count, url, home, 0, told, fork_from)
        return Submission(url, name, count, [], script, _advice(config, data, most))
    # The name is not known before the run is made: Slurm is asked with another.
    slurm.check(train_script(site, "fitv2", count, url, home, 0, told, fork_from))
    run = Run.open_or_create(config.run, config.model_dump(mode="json"), config.recipe(), data.plan.hash, parent)
    chain = Chain(
        run=run.url,
        name=job_name(run.id),
        home=str(home),
        steps=config.train.steps,
        least=least,
        most=most,
        tasks_per_node=site.tasks_per_node,
        partition=site.partition,
        fruitless=site.fruitless,
        exclude_minutes=site.exclude_minutes,
        on_event=site.on_event,
        tracked=config.tracking.uri != "none",
        signal_seconds=site.signal_seconds,
    )
    seen = len(run.log.entries())
    script = train_script(site, chain.name, count, run.url, home, seen, told, fork_from)
    private = write_home(home, config, run.url)
    chain.save()
    (home / "job.sh").write_text(script)
    _keep_copy(run, home)
    older = [job.id for job in slurm.queue(chain.name) if job.state == "PENDING"]
    ChainLog(run.store).add("SUBMIT", home=str(home), log=seen, nodes=nodes, git=source()["git"])
    slurm.cancel(older)
    jobs = [slurm.sbatch(str(home / "job.sh"), environment=to_environment(private)) for _ in range(1 + site.successors)]
    return Submission(run.url, chain.name, count, jobs, script, _advice(config, data, most))


def submit_command(site: SlurmConfig, nodes: str, command: list[str], dry_run: bool) -> Submission:
    """Queues one job that runs ``fitv2 COMMAND…`` in all its tasks."""
    _, count = parse_nodes(nodes)
    if not dry_run:
        _check_cluster(site)
    home = Path(site.folder or "jobs").absolute() / secrets.token_hex(4)
    name = f"fitv2-{'-'.join(command[:2])}"
    script = command_script(site, re.sub(r"[^A-Za-z0-9_.-]", "_", name), count, home, command)
    if redact(command) != command or redact(script) != script:
        raise UserError("the command holds what looks like a secret: export it in the shell that you submit from.")
    jobs = []
    if not dry_run:
        slurm.check(script)
        _copy_code(home / "code")
        (home / "job.sh").write_text(script)
        jobs = [slurm.sbatch(str(home / "job.sh"))]
    return Submission("", name, count, jobs, script)


def _check_cluster(site: SlurmConfig) -> None:
    if not slurm.available():
        raise UserError(
            "sbatch is not on this machine: use a login node of the cluster, or look at the script with --dry-run."
        )
    if site.partition and site.partition not in (known := slurm.partitions()):
        raise UserError(f"slurm.partition={site.partition}: this cluster has {', '.join(known)}.")


def _check_data(config: Config) -> None:
    if presets := [url for url in config.data.urls if is_preset(url)]:
        raise UserError(f"{presets[0]} has sizes only, for `fitv2 plan` and --dry-run: give a dataset as data.url.")


def _check_training(
    config: Config, least: int, most: int, fork_from: str | None
) -> "tuple[Data, dict[str, Any] | None]":
    """What training would find out first. Returns its data and the parent of a fork."""
    from fitv2_scale.data import Data  # only here: torch takes seconds
    from fitv2_scale.run.fork import Fork

    for nodes in {least, most}:
        tasks = config.slurm.tasks_per_node
        layout = config.layout.over(nodes * tasks, nodes)
        data = Data.open(config, layout.nodes([f"n{rank // tasks}" for rank in range(nodes * tasks)]))
    return data, Fork.parse(fork_from, config.run).parent() if fork_from else None


def _advice(config: Config, data: "Data", nodes: int) -> str:
    """What `fitv2 plan` says of the number of nodes, from published figures of GPUs; nothing where none are asked for.
    No job depends on it, so what it cannot say is said instead."""
    if config.slurm.gpus == "none":
        return ""
    from fitv2_scale.planning.forecast.assumptions import Assumptions
    from fitv2_scale.planning.forecast.plan_report import node_advice

    try:
        return node_advice(config, data, nodes, config.slurm.tasks_per_node, Assumptions())
    except UserError as error:
        return str(error)


def _home(site: SlurmConfig, url: str) -> Path:
    """Where the files of jobs lie: a folder that all nodes see."""
    if site.folder:
        return Path(site.folder).absolute() / Path(url).name
    if not isinstance(open_store(url), LocalStore):
        raise UserError(f"{url} is no folder: give one that all nodes see as slurm.folder, for what jobs print.")
    return Path(url) / "jobs"


def write_home(home: Path, config: Config, url: str) -> list[str]:
    """The code and the config as they are now, without secrets. Returns these, as overrides."""
    _copy_code(home / "code")
    plain = config.model_dump(mode="json") | {"run": url}
    shown = redact(plain)
    (home / "config.yaml").write_text(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True))
    true = flatten(plain)
    return [f"{key}={json.dumps(true[key])}" for key, value in flatten(shown).items() if value != true[key]]


def _copy_code(folder: Path) -> None:
    """The packages as they are imported here: tracked or not, installed or not."""
    for package in _PACKAGES:
        folder_of = Path(package.__path__[0])
        shutil.copytree(folder_of, folder / folder_of.name, ignore=shutil.ignore_patterns("__pycache__", "*.png", ".*"))
    LocalStore(str(folder)).put_json(SOURCE, redact(source()))


def _keep_copy(run: Run, home: Path) -> None:
    """For a run that is not on a disk: what it was submitted with, in the run."""
    if not isinstance(run.store, LocalStore):
        for name in ("config.yaml", CHAIN_FILE, "job.sh"):
            run.store.put(f"jobs/{home.name}/{name}", (home / name).read_bytes())
