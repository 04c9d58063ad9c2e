"""fitv2 submit, stop, save, logs and doctor: training on a Slurm cluster."""

import argparse
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from data_sharding.errors import UserError
from fitv2_scale.cli.common import before_joining, make, run_argument, show

if TYPE_CHECKING:
    from fitv2_scale.config.slurm import SlurmConfig
    from launchers.submit import Submission


def add(commands: Any) -> None:
    submit = make(commands, "submit", submit_jobs, "queue Slurm jobs: a chain that trains a run, or one command")
    submit.add_argument("overrides", nargs="*", metavar="CONFIG key=value", help="a YAML file, and changes to it")
    submit.add_argument("--nodes", default="1", metavar="N", help="nodes of each job; 2-4: as many as are available")
    submit.add_argument("--dry-run", action="store_true", help="print the batch script and queue nothing")
    submit.add_argument("--sweep", action="append", default=[], metavar="key=a,b", help="a chain for each combination")
    submit.add_argument("--fork-from", metavar="RUN@STEP", help="start a new run from a commit of another run")
    submit.set_defaults(behind=[])
    submit.epilog = "fitv2 submit [CONFIG] --nodes 4 -- shard write SRC DST runs that command in all tasks of one job."

    stop = make(commands, "stop", stop_run, "save, end the running attempt, and start no other")
    stop.add_argument("--now", action="store_true", help="end it without saving")
    save = make(commands, "save", save_run, "save a commit at the next step and continue training")
    logs = make(commands, "logs", print_log, "print the log of a rank")
    for parser in (stop, save, logs):
        run_argument(parser)
    logs.add_argument("--rank", type=int, default=0, help="the rank (default 0)")
    logs.add_argument("--lines", type=int, default=100, help="how many of the last lines (default 100)")
    doctor = make(
        commands,
        "doctor",
        examine_nodes,
        "check this machine, or all nodes of this job, before training",
        on_ranks=True,
    )
    doctor.add_argument("overrides", nargs="*", metavar="CONFIG key=value", help="also check its run and its dataset")


def submit_jobs(args: argparse.Namespace) -> int:
    from fitv2_scale.config.load import load_config
    from fitv2_scale.planning.forecast.gpus import DEFAULT_GPU
    from launchers.submit import submit, submit_command, sweep

    words = args.overrides
    config = words[0] if words and "=" not in words[0] else None
    overrides = words[1:] if config else words
    if args.behind:
        done = [submit_command(_slurm(config, overrides), args.nodes, args.behind, args.dry_run)]
    elif config is None:
        raise UserError("give a config as in `fitv2 submit configs/fitv2_3b2.yaml`, or a command behind --.")
    else:
        combinations = list(sweep(config, overrides, args.sweep)) if args.sweep else [overrides]
        configs = [load_config(config, each) for each in combinations]  # all are sound before the first is queued
        done = [submit(each, args.nodes, args.dry_run, args.fork_from) for each in configs]
    show(args, [asdict(s) for s in done], "\n".join(s.script if args.dry_run else _queued(s) for s in done))
    for s in done:
        for sentence in s.shell:
            print(f"fitv2: {sentence}", file=sys.stderr)
        if s.advice:  # not on stdout, which may be a script
            source = f"from published figures for an {DEFAULT_GPU}; `fitv2 plan` shows them and takes yours"
            print(f"fitv2: {s.name}: {s.advice} ({source})", file=sys.stderr)
    return 0


def _slurm(config: str | None, overrides: list[str]) -> "SlurmConfig":
    from fitv2_scale.config.load import load_config, load_slurm

    return load_config(config, overrides).slurm if config else load_slurm(overrides)


def _queued(submission: "Submission") -> str:
    from fitv2_scale.planning.forecast.words import counted

    jobs = f"job{'s' if len(submission.jobs) > 1 else ''} {', '.join(submission.jobs)}"
    hint = f"; `fitv2 status {submission.run}` shows the progress" if submission.run else ""
    return f"{submission.name}: {jobs} queued on {counted(submission.nodes, 'node')}{hint}"


def stop_run(args: argparse.Namespace) -> int:
    from launchers.control import stop

    done = stop(args.run, args.now)
    show(args, {"done": done}, "\n".join(done))
    return 0


def save_run(args: argparse.Namespace) -> int:
    from launchers.control import save

    done = save(args.run)
    show(args, {"done": done}, done)
    return 0


def print_log(args: argparse.Namespace) -> int:
    from launchers.control import log_file

    file = log_file(args.run, args.rank)
    lines = file.read_text(errors="replace").splitlines()[-args.lines :]
    show(args, {"file": str(file), "lines": lines}, "\n".join(lines))
    return 0


def examine_nodes(args: argparse.Namespace) -> int:
    from fitv2_scale.config.load import load_config
    from launchers.preflight import as_report, check_nodes, to_text

    words = args.overrides
    with before_joining():
        config = load_config(words[0], words[1:]) if words else None
    found = check_nodes(config)
    if os.environ.get("RANK", "0") == "0":
        show(args, as_report(found.findings), to_text(found.findings))
    if found.faults:
        raise UserError(f"not fit for training: {', '.join(f.what for f in found.findings if f.fault)}")
    return 0
