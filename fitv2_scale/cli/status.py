"""fitv2 status: attempts, commits and jobs of a run."""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

from fitv2_scale.cli.common import make, run_argument, show

_SECONDS = 5.0  # between two reports with --watch


def add(commands: Any) -> None:
    status = make(commands, "status", show_status, "show the attempts, commits and jobs of a run")
    run_argument(status)
    status.add_argument("--watch", action="store_true", help=f"repeat every {_SECONDS:.0f} seconds until Ctrl-C")


def show_status(args: argparse.Namespace) -> int:
    if args.watch:
        _repeat(lambda: _show_once(args))
    else:
        _show_once(args)
    return 0


def _show_once(args: argparse.Namespace) -> None:
    from fitv2_scale.run.run import Run
    from fitv2_scale.run.status import status
    from fitv2_scale.tracking.uploader_state import read_state
    from launchers.control import chain, jobs, waiting

    run = Run.open(args.run)
    report = status(run) | {"jobs": jobs(run), "chain": chain(run), "waiting": waiting(run)}
    report["tracking"] = read_state(run)
    show(args, report, "\n".join(_lines(report)))


def _lines(report: dict[str, Any]) -> list[str]:
    last = report["last_commit"]
    lines = [f"{report['id']}: " + (f"last commit at step {last['step']}, {last['time']}" if last else "no commit yet")]
    lines += [f"  the commit {c['path']} is damaged: {c['problem']}" for c in report["damaged"]]
    if report["damaged"]:
        start = report["next_start"]
        lines.append(f"  the next attempt continues from step {start}" if start is not None else "  none is whole")
    lines += [
        f"  attempt {a['attempt']}: started {a['started']}, {a['why']}"
        + (f" (exit code {a['code']})" if a["code"] is not None else "")
        + "".join(f"\n    changed: {change}" for change in a["changed"])
        for a in report["attempts"]
    ]
    if (lost := report["substituted"])["images"]:
        lines.append(f"  {lost['images']} images of {lost['frames']} frames are substituted: {lost['causes'][-1]}")
    if trouble := report["tracking"].get("trouble"):
        lines.append(f"  tracking, {report['tracking']['time']}: {trouble}")
    for job in report["jobs"]:
        ended = f"ended with {job['code']}: {job['reason']}" if job["ended"] else "running, or killed"
        blamed = f"; {', '.join(job['blamed'])} failed" if job["blamed"] else ""
        lines.append(f"  job {job['job']} on {', '.join(job['nodes'])}: {ended}{blamed}")
    lines += [f"  job {job['job']}: pending ({job['reason']})" for job in report["waiting"]]
    if report["chain"]:
        lines.append(f"  chain: {report['chain']['event'] or 'continues'}  {report['chain']['reason']}".rstrip())
    return lines


def _repeat(print_once: Callable[[], None]) -> None:
    """Prints again and again, on a cleared screen if there is one, until Ctrl-C."""
    try:
        while True:
            if sys.stdout.isatty():
                print("\033[2J\033[H", end="")
            print_once()
            time.sleep(_SECONDS)
    except KeyboardInterrupt:
        return
