"""fitv2 track: publishes runs to MLflow."""

import argparse
import sys
import time
from typing import Any

from fitv2_scale.cli.common import make, run_argument, show


def add(commands: Any) -> None:
    track = commands.add_parser("track", help="publish runs to MLflow").add_subparsers(required=True)
    sync = make(track, "sync", track_sync, "publish the journal of a run to MLflow, from any machine")
    run_argument(sync)
    sync.add_argument("--uri", help="MLflow tracking URI (default: where the run was published last)")
    sync.add_argument("--experiment", metavar="NAME", help="MLflow experiment (default: that of the newest attempt)")
    sync.add_argument("--follow", action="store_true", help="continue until the run is done, or until Ctrl-C")


def track_sync(args: argparse.Namespace) -> int:
    from fitv2_scale.run.run import Run
    from fitv2_scale.tracking.destination import resolve_uri, settings_of
    from fitv2_scale.tracking.sync import sync
    from fitv2_scale.tracking.uploader import Timing, follow, run_is_over

    run = Run.open(args.run)
    told = settings_of(run)
    uri, experiment = args.uri or told.uri, args.experiment or told.experiment
    if args.follow:
        _say(f"{args.run}: publishing to MLflow until the run is done; Ctrl-C ends the upload and loses nothing")
        follow(run, resolve_uri(args.run, uri), experiment, lambda: run_is_over(run), Timing(poll=10.0), _say)
    report = sync(args.run, uri, experiment, say=_say)
    sent = f"{report['metrics']} metrics and {report['pictures']} pictures sent"
    show(args, report, f"{args.run}: {sent}; MLflow at {report['uri']} has all committed steps")
    return 0


def _say(sentence: str) -> None:
    print(time.strftime("%H:%M:%S"), sentence, file=sys.stderr, flush=True)
