"""fitv2 track: MLflow."""

import argparse
from typing import Any

from fitv2_scale.commands.parsing import make, show


def add(commands: Any) -> None:
    track = commands.add_parser("track", help="MLflow").add_subparsers(required=True)
    sync = make(track, "sync", track_sync, "publish a run's journal to MLflow, from anywhere")
    sync.add_argument("run", metavar="RUN")
    sync.add_argument("--uri", help="tracking URI (default: the one in the run's config)")


def track_sync(args: argparse.Namespace) -> int:
    from fitv2_scale.run import Run
    from fitv2_scale.tracking.uploader import sync

    tracking = Run.open(args.run).config["tracking"]
    report = sync(args.run, args.uri or tracking["uri"], tracking["experiment"])
    sent = f"{report['metrics']} metrics and {report['pictures']} pictures sent"
    show(args, report, f"{args.run}: {sent}, MLflow at {report['uri']} has all that is committed")
    return 0
