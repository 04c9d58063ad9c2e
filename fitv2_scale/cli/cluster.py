"""The launcher's part of the command line."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from data_sharding.errors import UserError

Make = Callable[[Any, str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]
Print = Callable[[argparse.Namespace, Any, str], None]


def add_commands(commands: Any, make: Make, show: Print) -> None:
    """Adds submit, stop, save, logs and doctor; ``show`` prints a report as JSON or text."""

    def command(name: str, run: Callable[[argparse.Namespace, Print], int], text: str) -> argparse.ArgumentParser:
        return make(commands, name, lambda args: run(args, show), text)

    submit = command("submit", _submit, "queue a chain of Slurm jobs that trains, or any other command as a job")
    submit.add_argument("overrides", nargs="*", metavar="CONFIG key=value", help="a YAML file, and changes to it")
    submit.add_argument("--nodes", default="1", metavar="N", help="nodes of each job, or fewest and most as in 2-4")
    submit.add_argument("--dry-run", action="store_true", help="print the batch script, queue nothing")
    submit.add_argument("--sweep", action="append", default=[], metavar="key=a,b", help="a chain for each combination")
    submit.add_argument("--fork-from", metavar="RUN@STEP", help="begin a new run at another one's commit")
    submit.set_defaults(behind=[])
    submit.epilog = "fitv2 submit [CONFIG] --nodes 4 -- shard write SRC DST runs that command in all tasks of one job."

    stop = command("stop", _stop, "save, end the attempt that runs, and start no other")
    stop.add_argument("--now", action="store_true", help="without saving")
    save = command("save", _save, "commit now and go on")
    logs = command("logs", _logs, "what a rank printed")
    for parser in (stop, save, logs):
        parser.add_argument("run", metavar="RUN", help="the run's folder, or its s3:// URL")
    logs.add_argument("--rank", type=int, default=0, help="which one (default 0)")
    logs.add_argument("--lines", type=int, default=100, help="of its end (default 100)")
    doctor = command("doctor", _doctor, "check this machine, or all nodes of this job, before training")
    doctor.add_argument("overrides", nargs="*", metavar="CONFIG key=value", help="also checks its run and its data")


def _submit(args: argparse.Namespace, show: Print) -> int:
    from fitv2_scale.config.load import load_config
    from launchers.submit import submit, submit_command, sweep

    words = args.overrides
    config = words[0] if words and "=" not in words[0] else None
    overrides = words[1:] if config else words
    if args.behind:
        done = [submit_command(_site(config, overrides), args.nodes, args.behind, args.dry_run)]
    elif config is None:
        raise UserError("give a config as in `fitv2 submit configs/fitv2_3b2.yaml`, or a command behind --.")
    else:
        combinations = list(sweep(config, overrides, args.sweep)) if args.sweep else [overrides]
        configs = [load_config(config, each) for each in combinations]  # all are sound before the first is queued
        done = [submit(each, args.nodes, args.dry_run, args.fork_from) for each in configs]
    lines = []
    for s in done:
        queued = f"{s.name}: job{'s' if len(s.jobs) > 1 else ''} {', '.join(s.jobs)} queued on {s.nodes} nodes"
        lines.append(
            s.script if args.dry_run else queued + (f"; `fitv2 status {s.run}` tells how it goes" if s.run else "")
        )
    show(args, [asdict(s) for s in done], "\n".join(lines))
    for s in done:
        if s.advice:  # not among what is printed: that may be a script
            source = "by published figures of H100s; `fitv2 plan` names them, and takes yours"
            print(f"fitv2: {s.name}: {s.advice} ({source})", file=sys.stderr)
    return 0


def _site(config: str | None, overrides: list[str]):
    from fitv2_scale.config.load import load_config, load_slurm

    return load_config(config, overrides).slurm if config else load_slurm(overrides)


def _stop(args: argparse.Namespace, show: Print) -> int:
    from launchers.control import stop

    said = stop(args.run, args.now)
    show(args, {"done": said}, "\n".join(said))
    return 0


def _save(args: argparse.Namespace, show: Print) -> int:
    from launchers.control import save

    said = save(args.run)
    show(args, {"done": said}, said)
    return 0


def _logs(args: argparse.Namespace, show: Print) -> int:
    from launchers.control import log_file

    file = log_file(args.run, args.rank)
    lines = file.read_text(errors="replace").splitlines()[-args.lines :]
    show(args, {"file": str(file), "lines": lines}, "\n".join(lines))
    return 0


def _doctor(args: argparse.Namespace, show: Print) -> int:
    from fitv2_scale.config.load import load_config
    from launchers.preflight import as_report, examine, to_text

    words = args.overrides
    found = examine(load_config(words[0], words[1:]) if words else None)
    if os.environ.get("RANK", "0") == "0":
        show(args, as_report(found.findings), to_text(found.findings))
    if found.faults:
        raise UserError(f"not fit for training: {', '.join(f.what for f in found.findings if f.fault)}")
    return 0


def supervised(args: argparse.Namespace, config: Any) -> int:
    """`fitv2 train --supervise`."""
    import torch

    from launchers.supervise import supervise

    if not config.run:
        raise UserError("give the run's folder as run=FOLDER")
    command = [sys.executable, "-m", "fitv2_scale.cli", "train", args.config, *args.overrides]
    command += ["--fork-from", args.fork_from] if args.fork_from else []
    return supervise(config, command, args.processes or torch.cuda.device_count() or 1)


def watch(print_once: Callable[[], None], seconds: float = 5.0) -> None:
    """Prints again and again, on a cleared screen if there is one, until Ctrl-C."""
    try:
        while True:
            if sys.stdout.isatty():
                print("\033[2J\033[H", end="")
            print_once()
            time.sleep(seconds)
    except KeyboardInterrupt:
        return
