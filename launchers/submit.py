"""`fitv2 submit`: checks everything before it queues anything, then starts a chain of jobs."""

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import yaml

import data_sharding
import fitv2_scale
import launchers
from data_sharding.errors import UserError
from data_sharding.plan.size_presets import is_preset
from data_sharding.storage.failures import as_sentence, failure
from data_sharding.storage.local_store import LocalStore
from data_sharding.storage.open_store import open_store
from fitv2_scale.config.load import load_config, overridden_keys
from fitv2_scale.config.schema import Config
from fitv2_scale.config.slurm import SlurmConfig, seconds_of
from fitv2_scale.data import Data
from fitv2_scale.identity import check_start, open_run
from fitv2_scale.planning.forecast.assumptions import Assumptions
from fitv2_scale.planning.forecast.plan_report import node_advice
from fitv2_scale.run.differences import flatten
from fitv2_scale.run.fork import Fork
from fitv2_scale.run.paths import absolute_paths
from fitv2_scale.run.provenance import SOURCE, source
from fitv2_scale.run.redact import redact
from fitv2_scale.run.reference import parse_reference
from fitv2_scale.run.run import Run
from launchers import slurm
from launchers.batch_script import command_script, train_script
from launchers.chain import CHAIN_FILE, Chain, node_count
from launchers.chain_log import MIN_SIGNAL_SECONDS, ChainLog, signal_seconds
from launchers.cluster_check import check_cluster, check_script
from launchers.control import job_name
from launchers.sbatch_options import (
    changes_folder,
    excluded_nodes,
    partition_of,
    refuse_conflicts,
    refuse_lost_secrets,
    script_options,
    walltime_of,
    with_shell_options,
)
from launchers.secret_overrides import to_environment

_PACKAGES = (data_sharding, fitv2_scale, launchers)
_SECTIONS = ("model", "flow", "ddpm", "optimizer", "batch")  # an axis over one of them names configs


@dataclass(frozen=True)
class Submission:
    """The jobs that were queued; with ``--dry-run`` the script alone, and no ``jobs``."""

    run: str
    name: str
    nodes: int
    jobs: list[str]
    script: str
    advice: str = ""  # about the number of nodes
    shell: list[str] = field(default_factory=list)  # what was done with the shell's SBATCH_ variables, in sentences


def parse_nodes(text: str) -> tuple[int, int]:
    """``4`` or ``2-4``: the fewest and the most nodes of a job. Raises UserError."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 0 < least <= most:
        raise UserError(f"--nodes {text}: give a number as in 4, or the fewest and the most as in 2-4.")
    return least, most


def sweep(config: str, overrides: list[str], axes: list[str]) -> Iterator[list[str]]:
    """The overrides of each combination of the axes ``key=a,b,c``, each with a run of its own below ``run``.

    A value for a whole section, as in model=fitv2_s2,fitv2_b2, names a config in the folder of ``config`` that has the
    section; other axes and ``overrides`` may change keys of it.
    """
    parsed = [axis.partition("=") for axis in axes]
    for axis, (_, equals, values) in zip(axes, parsed, strict=True):
        if not equals or not values:
            raise UserError(f"--sweep {axis}: give it as key=a,b,c")
    if "run" not in overridden_keys(overrides):
        raise UserError("--sweep needs run=FOLDER, below which each combination gets a run of its own.")
    (run,) = [override.removeprefix("run=") for override in overrides if override.startswith("run=")]
    others = [override for override in overrides if not override.startswith("run=")]
    for values in product(*(values.split(",") for _, _, values in parsed)):
        pairs = list(zip((key for key, _, _ in parsed), values, strict=True))
        name = "_".join(f"{key.split('.')[-1]}-{value}" for key, value in pairs)
        stated = [*others, *(f"{key}={value}" for key, value in pairs if key not in _SECTIONS)]
        keys = overridden_keys(stated)
        sections = [_section(config, key, value, keys) for key, value in pairs if key in _SECTIONS]
        yield [*sections, *stated, f"run={run.rstrip('/')}/{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}"]


def _section(config: str, key: str, value: str, stated: set[str]) -> str:
    """The section ``key`` of the config named ``value`` as an override, without the keys that are ``stated``."""
    section = getattr(load_config(str(Path(config).with_name(f"{value}.yaml"))), key)
    return f"{key}={json.dumps(_without(section.model_dump(mode='json'), f'{key}.', stated))}"


def _without(section: dict[str, Any], prefix: str, stated: set[str]) -> dict[str, Any]:
    return {
        key: _without(value, f"{prefix}{key}.", stated) if isinstance(value, dict) else value
        for key, value in section.items()
        if f"{prefix}{key}" not in stated
    }


def submit(config: Config, nodes: str, dry_run: bool, fork_from: str | None = None) -> Submission:
    """Queues the first job of a chain that trains, or replaces the pending jobs of the run's chain.

    Raises UserError.
    """
    least, most = parse_nodes(nodes)
    if not config.run:
        raise UserError("give the run's folder as run=FOLDER")
    site, shell = with_shell_options(config.slurm, os.environ)
    config = config.model_copy(update={"slurm": site})
    if changes_folder(site.extra):
        config, fork_from = _independent_of_the_folder(config, fork_from)
    refuse_conflicts(site.extra, chain=True)
    refuse_lost_secrets(site.extra, secret_overrides(config))
    if not dry_run:
        check_cluster(site)
        _check_data(config)
    data, parent = _check_training(config, least, most, fork_from)
    url = open_store(config.run).url
    home = _home(site, url) / secrets.token_hex(4)
    known = Run.open(url) if open_store(url).exists("run.json") else None
    seconds = signal_seconds(known, site.signal_seconds) if known else site.signal_seconds or MIN_SIGNAL_SECONDS
    if seconds_of(walltime_of(site)) <= seconds:
        raise UserError(
            f"slurm.walltime={walltime_of(site)} leaves no time to train: Slurm asks for a save {seconds} s before the "
            "limit. Raise it, or set slurm.signal_seconds."
        )
    if dry_run:
        name = job_name(known.id if known else f"{Path(url).name}-new")
        script = train_script(site, name, most, url, home, 0, seconds, fork_from)
        return Submission(url, name, most, [], script, _advice(config, data, most), shell)
    # The job's name has the run's id; Slurm is asked before the run is created, so with another name.
    count = _node_count(site, train_script(site, "fitv2", least, url, home, 0, seconds, fork_from), least, most)
    check_script(train_script(site, "fitv2", count, url, home, 0, seconds, fork_from))
    run = open_run(config, data.plan, parent)
    chain = _chain(config, run, home, least, most)
    seen = len(run.log.entries())
    script = train_script(site, chain.name, count, run.url, home, seen, seconds, fork_from)
    secret = write_home(home, config, run.url)
    with as_sentence(home):
        chain.save()
        (home / "job.sh").write_text(script)
    _keep_copy(run, home)
    older = [job.id for job in slurm.queue(chain.name) if job.state == "PENDING"]
    ChainLog(run.store).add("SUBMIT", home=str(home), log=seen, nodes=nodes, git=source()["git"])
    slurm.cancel(older)
    jobs = [slurm.sbatch(str(home / "job.sh"), environment=to_environment(secret)) for _ in range(1 + site.successors)]
    return Submission(run.url, chain.name, count, jobs, script, _advice(config, data, most), shell)


def _independent_of_the_folder(config: Config, fork_from: str | None) -> tuple[Config, str | None]:
    """Both with absolute paths, for jobs that begin in another folder than this one."""
    if fork_from:
        parent, step = parse_reference(fork_from, "--fork-from")
        fork_from = f"{open_store(parent).url}@{step}"
    return type(config).model_validate(absolute_paths(config.model_dump(mode="json"))), fork_from


def _node_count(site: SlurmConfig, script: str, least: int, most: int) -> int:
    """As many nodes as the script could have; ``least`` if Slurm would not accept it at all."""
    usable = set(slurm.usable_nodes(partition_of(site))) - set(excluded_nodes(script_options(script)))
    return slurm.most_nodes(script, least, node_count(len(usable), least, most))


def _chain(config: Config, run: Run, home: Path, least: int, most: int) -> Chain:
    site = config.slurm
    return Chain(
        run=run.url,
        name=job_name(run.id),
        home=str(home),
        steps=config.train.steps,
        least=least,
        most=most,
        tasks_per_node=site.tasks_per_node,
        partition=partition_of(site),
        fruitless=site.fruitless,
        exclude_minutes=site.exclude_minutes,
        on_event=site.on_event,
        tracked=config.tracking.uri != "none",
        signal_seconds=site.signal_seconds,
    )


def submit_command(site: SlurmConfig, nodes: str, command: list[str], dry_run: bool) -> Submission:
    """Queues one job that runs ``fitv2 COMMAND…`` in all its tasks."""
    _, count = parse_nodes(nodes)
    site, shell = with_shell_options(site, os.environ)
    refuse_conflicts(site.extra, chain=False)
    if not dry_run:
        check_cluster(site)
    home = Path(site.folder or "jobs").absolute() / secrets.token_hex(4)
    name = f"fitv2-{'-'.join(command[:2])}"
    script = command_script(site, re.sub(r"[^A-Za-z0-9_.-]", "_", name), count, home, command)
    if redact(command) != command or redact(script) != script:
        raise UserError("the command contains what looks like a secret: export it in the shell that you submit from.")
    jobs = []
    if not dry_run:
        check_script(script)
        _copy_code(home / "code")
        with as_sentence(home):
            (home / "job.sh").write_text(script)
        jobs = [slurm.sbatch(str(home / "job.sh"))]
    return Submission("", name, count, jobs, script, shell=shell)


def _check_data(config: Config) -> None:
    if presets := [url for url in config.data.urls if is_preset(url)]:
        raise UserError(f"{presets[0]} has sizes only, for `fitv2 plan` and --dry-run: set data.url to a dataset.")


def _check_training(config: Config, least: int, most: int, fork_from: str | None) -> tuple[Data, dict[str, Any] | None]:
    """The checks that training makes first. Returns its data and the parent of a fork."""
    for nodes in {least, most}:
        tasks = config.slurm.tasks_per_node
        layout = config.layout.over(nodes * tasks, nodes)
        data = Data.open(config, layout.nodes([f"n{rank // tasks}" for rank in range(nodes * tasks)]))
    fork = Fork.parse(fork_from, config.run) if fork_from else None
    check_start(config, data.plan, fork)
    return data, fork.parent() if fork else None


def _advice(config: Config, data: Data, nodes: int) -> str:
    """The sentence of `fitv2 plan` about the number of nodes, from published figures of GPUs; nothing if no GPUs are
    requested. No job depends on it, so an error is returned as the sentence."""
    if config.slurm.gpus == "none":
        return ""
    try:
        return node_advice(config, data, nodes, config.slurm.tasks_per_node, Assumptions())
    except UserError as error:
        return str(error)


def _home(site: SlurmConfig, url: str) -> Path:
    """The folder for the files of jobs, which all nodes must see. Raises UserError if there is none."""
    if site.folder:
        return Path(site.folder).absolute() / Path(url).name
    if not isinstance(open_store(url), LocalStore):
        raise UserError(f"{url} is not a folder: set slurm.folder to one that all nodes see, for the output of jobs.")
    return Path(url) / "jobs"


def write_home(home: Path, config: Config, url: str) -> list[str]:
    """Writes the code and the config as they are now, without secrets. Returns the secrets, as overrides."""
    _copy_code(home / "code")
    shown = redact(config.model_dump(mode="json") | {"run": url})
    with as_sentence(home):
        (home / "config.yaml").write_text(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True))
    return secret_overrides(config)


def secret_overrides(config: Config) -> list[str]:
    """The secrets in ``config``, as overrides: ["tracking.uri=\"https://me:secret@host\""]."""
    true = config.model_dump(mode="json")
    shown = flatten(redact(true))
    return [f"{key}={json.dumps(value)}" for key, value in flatten(true).items() if value != shown[key]]


def _copy_code(folder: Path) -> None:
    """Copies the packages that this process has imported, whether or not git tracks them."""
    ignored = shutil.ignore_patterns("__pycache__", "*.png", ".*")
    try:
        for package in _PACKAGES:
            folder_of = Path(package.__path__[0])
            shutil.copytree(folder_of, folder / folder_of.name, ignore=ignored)
    except shutil.Error as error:  # it holds, for each file, the two paths and the reason
        raise UserError(f"the code cannot be copied to {folder}: {error.args[0][0][2]}") from error
    except OSError as error:
        raise failure(str(folder), error) from error
    LocalStore(str(folder)).put_json(SOURCE, redact(source()))


def _keep_copy(run: Run, home: Path) -> None:
    """Copies config, chain and script into the run, if it is not on a disk."""
    if not isinstance(run.store, LocalStore):
        for name in ("config.yaml", CHAIN_FILE, "job.sh"):
            run.store.put(f"jobs/{home.name}/{name}", (home / name).read_bytes())
