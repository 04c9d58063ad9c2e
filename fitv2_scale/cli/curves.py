"""fitv2 curves: scaling laws from the losses of runs, and predictions."""

import argparse
from pathlib import Path
from typing import Any

from data_sharding.errors import UserError
from fitv2_scale.cli.common import make, show


def add(commands: Any) -> None:
    curves = make(commands, "curves", curves_of_runs, "fit scaling laws to runs: table, plots, predictions")
    curves.add_argument("runs", nargs="*", metavar="RUN", help="folders or s3:// URLs of runs")
    curves.add_argument("--experiment", metavar="NAME", help="read all training runs of an MLflow experiment instead")
    curves.add_argument("--uri", help="MLflow tracking URI (default: the first run's); none: do not publish")
    curves.add_argument(
        "--out", default="curves", metavar="FOLDER", help="folder of report and plots (default: curves)"
    )
    curves.add_argument("--published", action="store_true", help="also show the FIDs of the papers")
    curves.add_argument(
        "--target", type=float, metavar="FID", help="estimate what it takes to reach it (default: 26.08, FiT-B/2's)"
    )
    curves.add_argument(
        "--baseline", metavar="NAME", help="compare families with this one, as in FiT or FiT-B/2 (default: the first)"
    )
    curves.add_argument(
        "--predict",
        action="append",
        default=[],
        metavar="CONFIG@STEP",
        help="predict a loss, as in fitv2_3b2@2000000; the prediction is stored and scored by later calls",
    )


def curves_of_runs(args: argparse.Namespace) -> int:
    from fitv2_scale.planning.scaling import read_curves
    from fitv2_scale.planning.scaling.curves_report import CurvesOptions, analyse, build_report, to_text
    from fitv2_scale.planning.scaling.save_report import draw, publish, write

    if args.runs and args.experiment:
        raise UserError("give runs or --experiment, not both")
    if args.experiment and not args.uri:
        raise UserError("--experiment needs --uri, as in --uri sqlite:////runs/mlflow.db")
    if args.experiment:
        curves = read_curves.from_mlflow(args.uri, args.experiment)
    else:
        curves = [read_curves.from_journal(url) for url in args.runs]
    options = CurvesOptions(Path(args.out), args.published, args.target, tuple(args.predict), args.baseline)
    analysis = analyse(curves, options)
    report = build_report(analysis, options)
    files = [*draw(analysis, options), *write(report, to_text(report), options.folder)]
    report["files"] = [str(file) for file in files]
    report["mlflow"] = publish(report, files, *place) if (place := _place(args)) else None
    lines = [to_text(report), f"written to {args.out}: {', '.join(file.name for file in files)}"]
    if report["mlflow"]:
        lines.append(f"in MLflow at {report['mlflow']['uri']}: run {report['mlflow']['run']}")
    show(args, report, "\n".join(lines))
    return 0


def _place(args: argparse.Namespace) -> tuple[str, str] | None:
    """MLflow's URI and experiment for the report; None: nowhere."""
    from fitv2_scale.run.run import Run
    from fitv2_scale.tracking.destination import resolve_uri, settings_of

    if args.uri == "none" or not (args.experiment or args.runs):
        return None
    if args.experiment:
        return args.uri, args.experiment
    run = Run.open(args.runs[0])
    told = settings_of(run)
    uri = args.uri or told.uri
    return None if uri == "none" else (resolve_uri(run.url, uri), told.experiment)
