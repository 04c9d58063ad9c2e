"""fitv2 train and fitv2 status."""

import argparse
from typing import Any

from fitv2_scale.cli.cluster import supervised, watch
from fitv2_scale.cli.common import config_arguments, make, run_argument, show


def add(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train in the processes this is started in (plain, torchrun or srun)",
        description="Train in the processes this is started in (plain, torchrun or srun). The same command again goes "
        "on where the run stands.",
    )
    train.set_defaults(command=train_run)
    config_arguments(train)
    train.add_argument("--fork-from", metavar="RUN@STEP", help="begin a new run at another one's commit")
    train.add_argument("--supervise", action="store_true", help="start the processes here, and again until all is done")
    train.add_argument("--processes", type=int, metavar="N", help="with --supervise (default: one a GPU, else 1)")

    shown = make(commands, "status", status, "attempts and commits of a run")
    run_argument(shown)
    shown.add_argument("--watch", action="store_true", help="again every 5 seconds, until Ctrl-C")


def train_run(args: argparse.Namespace) -> int:
    from fitv2_scale.config.load import load_config
    from fitv2_scale.train.loop import train

    config = load_config(args.config, args.overrides)
    return supervised(args, config) if args.supervise else train(config, args.fork_from)


def status(args: argparse.Namespace) -> int:
    if args.watch:
        watch(lambda: _status_once(args))
        return 0
    return _status_once(args)


def _status_once(args: argparse.Namespace) -> int:
    from fitv2_scale.run.run import Run
    from fitv2_scale.run.status import status
    from launchers.control import chain, jobs

    run = Run.open(args.run)
    report = status(run) | {"jobs": jobs(run), "chain": chain(run)}
    last = report["last_commit"]
    lines = [f"{report['id']}: " + (f"last commit at step {last['step']}, {last['time']}" if last else "no commit yet")]
    lines += [
        f"  attempt {a['attempt']}: started {a['started']}, {a['why']}"
        + (f" (exit code {a['code']})" if a["code"] is not None else "")
        + "".join(f"\n    changed: {change}" for change in a["changed"])
        for a in report["attempts"]
    ]
    if (lost := report["substituted"])["images"]:
        lines.append(f"  {lost['images']} images of {lost['frames']} frames are replaced: {lost['causes'][-1]}")
    for job in report["jobs"]:
        ended = f"ended with {job['code']}: {job['reason']}" if job["ended"] else "running, or killed"
        blamed = f"; {', '.join(job['blamed'])} failed" if job["blamed"] else ""
        lines.append(f"  job {job['job']} on {', '.join(job['nodes'])}: {ended}{blamed}")
    if report["chain"]:
        lines.append(f"  chain: {report['chain']['event'] or 'goes on'}  {report['chain']['reason']}".rstrip())
    show(args, report, "\n".join(lines))
    return 0
