"""Batch scripts: a template with @NAMES@ in it, and their values."""

import re
import shlex
import sys
from pathlib import Path

from data_sharding.errors import UserError
from fitv2_scale.config.slurm import NCCL_PROFILES, SlurmConfig
from fitv2_scale.run.redact import redact

_FOLDER = Path(__file__).parent
_MARK = re.compile(r"@([A-Z]+)@")


def train_script(
    site: SlurmConfig,
    name: str,
    nodes: int,
    run: str,
    home: Path,
    log_seen: int,
    signal: int,
    fork_from: str | None = None,
) -> str:
    """The script of one attempt of the run at URL ``run``, whose files lie in ``home``. The run's log has ``log_seen``
    entries; the job gets its signal to save ``signal`` seconds before the time limit. Raises UserError."""
    template = Path(site.template) if site.template else _FOLDER / "train.sh.in"
    fork = f" --fork-from {shlex.quote(fork_from)}" if fork_from else ""
    fields = {"RUN": run, "SIGNAL": str(signal), "SEEN": str(log_seen), "FORK": fork}
    return _render(template, site, name, nodes, home, fields)


def command_script(site: SlurmConfig, name: str, nodes: int, home: Path, command: list[str]) -> str:
    """The script that runs ``fitv2 COMMAND…`` in all tasks."""
    return _render(_FOLDER / "command.sh.in", site, name, nodes, home, {"COMMAND": shlex.join(command)})


def _render(template: Path, site: SlurmConfig, name: str, nodes: int, home: Path, fields: dict[str, str]) -> str:
    _refuse_secrets(site)
    fields |= {
        "DIRECTIVES": "\n".join(f"#SBATCH {option}" for option in _options(site, name, nodes, home)),
        "HOME": shlex.quote(str(home)),
        "OUTPUT": shlex.quote(f"{_literal(home)}/rank-%t.log"),
        "PYTHON": shlex.quote(site.python or sys.executable),
        "SUBMITTER": shlex.quote(sys.executable),
        "SETUP": "\n".join([*site.setup, *_exports(site)]),
        "TASKS": str(site.tasks_per_node),
        "CPUS": f"--cpus-per-task={site.cpus_per_task} " if site.cpus_per_task else "",
        "WRAP": f"{site.wrap} " if site.wrap else "",
    }
    try:
        text = template.read_text()
    except OSError as error:
        raise UserError(f"slurm.template {template} cannot be read: {error.strerror}.") from error
    if unknown := sorted({mark for mark in _MARK.findall(text) if mark not in fields}):
        raise UserError(f"{template} has @{unknown[0]}@, which is not one of {', '.join(sorted(fields))}.")
    return _MARK.sub(lambda mark: fields[mark[1]], text)


def _options(site: SlurmConfig, name: str, nodes: int, home: Path) -> list[str]:
    """The sbatch options of ``site``; those of chains alone are in the template."""
    tasks = site.tasks_per_node
    gpus = {
        "gres": f"--gres=gpu:{tasks}",
        "typed": f"--gres=gpu:{site.gpu_type}:{tasks}",
        "gpus-per-node": f"--gpus-per-node={tasks}",
        "none": "",
    }
    if site.gpus == "typed" and not site.gpu_type:
        raise UserError("slurm.gpus=typed needs slurm.gpu_type, as in slurm.gpu_type=h100.")
    options = {
        "--job-name": name,
        "--nodes": str(nodes),
        "--ntasks-per-node": str(tasks),
        "--cpus-per-task": str(site.cpus_per_task or ""),
        "--mem": site.memory,
        "--time": site.walltime,
        "--partition": site.partition,
        "--account": site.account,
        "--qos": site.qos,
        "--constraint": f'"{site.constraint}"' if site.constraint else "",
        "--output": f'"{_literal(home)}/job-%j.out"',
    }
    given = [f"{option}={value}" for option, value in options.items() if value]
    return [*given, *filter(None, [gpus[site.gpus], "--exclusive" if site.exclusive else ""]), *site.extra]


def _literal(folder: Path) -> str:
    """``folder`` as a part of a file name that Slurm takes as it is, without filling in what begins with %. Raises
    UserError if it has a character that Slurm cannot take."""
    if bad := sorted(set(str(folder)) & set('\\"\n')):
        raise UserError(f"{folder} has {bad[0]!r} in its name, which Slurm takes otherwise: choose another folder.")
    return str(folder).replace("%", "%%")


def _exports(site: SlurmConfig) -> list[str]:
    return [f"export {key}={shlex.quote(value)}" for key, value in NCCL_PROFILES[site.nccl].items()]


def _refuse_secrets(site: SlurmConfig) -> None:
    """Other users may read the script, and Slurm keeps a copy of it."""
    for key in ("setup", "extra", "wrap", "on_event"):
        if redact(value := getattr(site, key)) != value:
            raise UserError(
                f"slurm.{key} contains what looks like a secret: export it in the shell that you submit from instead; "
                "jobs inherit its environment."
            )
