"""fitv2 checkpoint: list, verify, sweep, import and export commits."""

import argparse
import json
from dataclasses import asdict
from typing import Any

from data_sharding.errors import UserError
from fitv2_scale.cli.common import make, run_argument, show


def add(commands: Any) -> None:
    checkpoint = commands.add_parser("checkpoint", help="list, verify, sweep, import and export commits")
    checkpoint = checkpoint.add_subparsers(required=True)
    listing = make(checkpoint, "list", checkpoint_list, "list the commits of a run")
    run_argument(listing)
    check = make(checkpoint, "verify", checkpoint_verify, "check every file of every commit against its digest")
    run_argument(check)
    sweep = make(checkpoint, "sweep", checkpoint_sweep, "list what killed attempts left behind; --yes deletes it")
    run_argument(sweep)
    sweep.add_argument("--yes", action="store_true", help="delete what is listed")
    importing = make(checkpoint, "import", checkpoint_import, "make a run from public weights")
    importing.add_argument("file", metavar="FILE", help=".safetensors, .bin or .pt, float32")
    importing.add_argument("run", metavar="RUN", help="folder of the new run")
    importing.add_argument("--config", required=True, help="config whose model fits the weights")
    export = make(checkpoint, "export", checkpoint_export, "write the weights of a commit under their public names")
    run_argument(export)
    export.add_argument("file", metavar="FILE.safetensors")
    export.add_argument("--ema", action="store_true", help="write the EMA weights instead of the raw ones")
    export.add_argument("--step", type=int, help="step of the commit (default: the newest)")
    export.add_argument(
        "--format",
        choices=("fit", "dit", "diffusers"),
        default="fit",
        help="whose names, shapes and order: fit, also FiTv2's and those of every run; dit, also SiT's; diffusers' DiT",
    )


def checkpoint_list(args: argparse.Namespace) -> int:
    from fitv2_scale.run.run import Run

    commits = Run.open(args.run).log.commits()
    report = [
        {"step": e.fields["step"], "time": e.time, "attempt": e.attempt, "path": e.fields["path"]} for e in commits
    ]
    show(args, report, "\n".join(f"step {c['step']:>8}  {c['time']}  {c['path']}" for c in report) or "no commit yet")
    return 0


def checkpoint_verify(args: argparse.Namespace) -> int:
    from fitv2_scale.checkpoint.commit import verify_commit
    from fitv2_scale.run.quarantine import quarantine
    from fitv2_scale.run.run import Run

    run, report = Run.open(args.run), []
    for entry in run.log.commits():
        problems = verify_commit(run, entry)
        if problems:
            quarantine(run, entry, "; ".join(problems))  # so that it does not count as one of those to keep
        report.append({"step": entry.fields["step"], "problems": problems})
    show(args, report, "\n".join(f"step {c['step']:>8}  {'; '.join(c['problems']) or 'whole'}" for c in report))
    if bad := [str(c["step"]) for c in report if c["problems"]]:
        whole = [c["step"] for c in report if not c["problems"]]
        then = (
            f"the next attempt continues from step {whole[-1]}" if whole else "restore their files, or start a new run"
        )
        raise UserError(f"{args.run}: the commits at step {', '.join(bad)} are not whole; {then}")
    return 0


def checkpoint_sweep(args: argparse.Namespace) -> int:
    from fitv2_scale.checkpoint.cleanup import leftovers, remove
    from fitv2_scale.run.run import Run

    run = Run.open(args.run)
    found = leftovers(run)
    if args.yes:
        remove(run, found)
    lines = [f"{folder}: saved by an attempt that ended, never committed" for folder in found.abandoned]
    lines += [f"{folder}: a retired commit" for folder in found.retired]
    lines += [f"{path}: an upload that was never finished" for path, _ in found.uploads]
    if lines:
        lines.append("all are deleted" if args.yes else "--yes deletes all of these")
    show(args, asdict(found) | {"deleted": args.yes}, "\n".join(lines) or "nothing was left behind")
    return 0


def checkpoint_import(args: argparse.Namespace) -> int:
    from fitv2_scale.checkpoint.weights import WrongWeights, import_weights
    from fitv2_scale.config.load import load_config

    try:
        found = import_weights(args.file, args.run, load_config(args.config))
    except WrongWeights as error:
        if args.json:
            print(json.dumps({"missing": error.missing, "left_over": error.left_over}, indent=2))
        raise
    url, weights = found.run.url, found.weights
    report = {"run": url, "step": 0, "part": weights.part, "layout": weights.layout}
    show(args, report, f"{url}: holds {args.file}{weights.origin} as its commit at step 0")
    return 0


def checkpoint_export(args: argparse.Namespace) -> int:
    from fitv2_scale.checkpoint.weights import export_weights

    step = export_weights(args.run, args.file, args.ema, args.step, args.format)
    kind = "EMA weights" if args.ema else "weights"
    report = {"file": args.file, "step": step, "ema": args.ema, "format": args.format}
    show(args, report, f"{args.file}: the {kind} of step {step}")
    return 0
