"""What each command of the command line does: calls the part that knows, shows its report.

Heavy imports (torch) stand inside the commands that need them: `fitv2 --help` answers at once.
"""

import argparse
import json
from dataclasses import asdict
from typing import Any

from data_sharding.errors import UserError
from launchers.commands import supervised, watch


def show(args: argparse.Namespace, report: Any, text: str) -> None:
    print(json.dumps(report, indent=2) if args.json else text)


def shard_write(args: argparse.Namespace) -> int:
    from data_sharding.write import write_dataset

    options = {"holdout": args.holdout, "workers": args.workers, "vae": args.vae, "latent": args.latent}
    return _written(args, write_dataset(args.src, args.dst, args.codec, args.max_tokens, **options))


def shard_import(args: argparse.Namespace) -> int:
    from data_sharding.import_latents import import_dataset

    return _written(
        args,
        import_dataset(args.src, args.dst, args.max_tokens, args.holdout, args.workers, classes=args.classes),
    )


def _written(args: argparse.Namespace, report: Any) -> int:
    held_out = f", {report.held_out} of them held out" if report.held_out else ""
    show(
        args,
        asdict(report),
        f"{report.url}: {report.images + report.held_out} images in {report.shards} shards{held_out}, "
        f"{report.bytes / 1e6:.1f} MB",
    )
    if report.skipped:
        raise UserError(
            f"{report.skipped} of the images could not be read and were left out, the rest is written: "
            f"{report.url}/skipped.json names them"
        )
    return 0


def shard_inspect(args: argparse.Namespace) -> int:
    from data_sharding import inspect

    figures = inspect.inspect(args.url)
    if args.picture:
        inspect.save_picture(figures, args.picture)
    show(args, figures, inspect.to_text(figures))
    return 0


def shard_verify(args: argparse.Namespace) -> int:
    from data_sharding.verify import verify

    report = verify(args.url)
    rate = f"{report.bytes / 1e6:.1f} MB at {report.bytes / 1e6 / report.seconds:.0f} MB/s"
    good = f"{args.url}: all is well, {rate}"
    show(args, asdict(report), "\n".join(report.problems) or good)
    if report.problems:
        raise UserError(
            f"{args.url}: {len(report.problems)} problems found; restore the files named or write them anew"
        )
    return 0


def plan_run(args: argparse.Namespace) -> int:
    from fitv2_scale.config import load_config
    from fitv2_scale.forecast import forecast, to_text

    report = forecast(load_config(args.config, args.overrides), args.nodes * args.gpus_per_node, args.nodes)
    show(args, report, to_text(report))
    return 0


def train_run(args: argparse.Namespace) -> int:
    from fitv2_scale.config import load_config
    from fitv2_scale.train import train

    config = load_config(args.config, args.overrides)
    return supervised(args, config) if args.supervise else train(config, args.fork_from)


def status(args: argparse.Namespace) -> int:
    if args.watch:
        watch(lambda: _status_once(args))
        return 0
    return _status_once(args)


def _status_once(args: argparse.Namespace) -> int:
    from fitv2_scale.run import Run, status
    from launchers.control import chain, jobs

    run = Run.open(args.run)
    report = status(run) | {"jobs": jobs(run), "chain": chain(run)}
    last = report["last_commit"]
    lines = [f"{report['id']}: " + (f"last commit at step {last['step']}, {last['time']}" if last else "no commit yet")]
    lines += [
        f"  attempt {a['attempt']}: started {a['started']}, {a['why']}"
        + (f" (exit code {a['code']})" if a["code"] is not None else "")
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


def checkpoint_list(args: argparse.Namespace) -> int:
    from fitv2_scale.run import Run

    commits = Run.open(args.run).log.commits()
    report = [
        {"step": e.fields["step"], "time": e.time, "attempt": e.attempt, "path": e.fields["path"]} for e in commits
    ]
    show(args, report, "\n".join(f"step {c['step']:>8}  {c['time']}  {c['path']}" for c in report) or "no commit yet")
    return 0


def checkpoint_verify(args: argparse.Namespace) -> int:
    from fitv2_scale.checkpoint.checkpointer import verify_commit
    from fitv2_scale.run import Run

    run = Run.open(args.run)
    report = [{"step": entry.fields["step"], "problems": verify_commit(run, entry)} for entry in run.log.commits()]
    show(args, report, "\n".join(f"step {c['step']:>8}  {'; '.join(c['problems']) or 'whole'}" for c in report))
    if bad := [str(c["step"]) for c in report if c["problems"]]:
        raise UserError(f"{args.run}: the commits at step {', '.join(bad)} are not whole; training passes over them")
    return 0


def checkpoint_sweep(args: argparse.Namespace) -> int:
    from fitv2_scale.checkpoint.sweep import leftovers, remove
    from fitv2_scale.run import Run

    run = Run.open(args.run)
    found = leftovers(run)
    if args.yes:
        remove(run, found)
    lines = [f"{folder}: saved by an attempt that ended, never committed" for folder in found.abandoned]
    lines += [f"{folder}: a retired commit" for folder in found.retired]
    lines += [f"{path}: begun, never finished" for path, _ in found.uploads]
    if lines:
        lines.append("all deleted" if args.yes else "--yes deletes these")
    show(args, asdict(found) | {"deleted": args.yes}, "\n".join(lines) or "nothing is left over")
    return 0


def checkpoint_import(args: argparse.Namespace) -> int:
    from fitv2_scale.checkpoint.weights import WrongWeights, import_weights
    from fitv2_scale.config import load_config

    try:
        run = import_weights(args.file, args.run, load_config(args.config))
    except WrongWeights as error:
        if args.json:
            print(json.dumps({"missing": error.missing, "left_over": error.left_over}, indent=2))
        raise
    show(args, {"run": run.url, "step": 0}, f"{run.url}: holds {args.file} as its commit at step 0")
    return 0


def checkpoint_export(args: argparse.Namespace) -> int:
    from fitv2_scale.checkpoint.weights import export_weights

    step = export_weights(args.run, args.file, args.ema, args.step)
    kind = "EMA weights" if args.ema else "weights"
    show(args, {"file": args.file, "step": step, "ema": args.ema}, f"{args.file}: the {kind} of step {step}")
    return 0


def track_sync(args: argparse.Namespace) -> int:
    from fitv2_scale.run import Run
    from fitv2_scale.tracking.uploader import sync

    tracking = Run.open(args.run).config["tracking"]
    report = sync(args.run, args.uri or tracking["uri"], tracking["experiment"])
    sent = f"{report['metrics']} metrics and {report['pictures']} pictures sent"
    show(args, report, f"{args.run}: {sent}, MLflow at {report['uri']} has all that is committed")
    return 0


def bench_data(args: argparse.Namespace) -> int:
    if args.against:
        from fitv2_scale.bench import loaders

        report = loaders.measure(args.against, args.images, args.repeats, args.seconds, args.folder, args.s3)
        show(args, report, loaders.to_text(report))
        return 0
    from fitv2_scale.bench import data_figures

    report = data_figures.measure(args.only.split(",") if args.only else data_figures.PARTS, args.steps, args.long)
    show(args, report, data_figures.to_text(report))
    return 0


def bench_step(args: argparse.Namespace) -> int:
    from fitv2_scale.bench import step
    from fitv2_scale.config import load_config

    config = load_config(args.config, args.overrides)
    report = step.measure(config, args.steps, args.repeats, args.against == "reference")
    if report is not None:
        show(args, report, step.to_text(report))
    return 0


def bench_checkpoint(args: argparse.Namespace) -> int:
    from fitv2_scale.bench import checkpoint
    from fitv2_scale.config import load_config

    if args.s3 and not args.s3.startswith("s3://"):
        raise UserError(f"--s3 {args.s3}: give s3://BUCKET/FOLDER")
    if args.saves < 1:
        raise UserError(f"--saves {args.saves}: give at least 1")
    report = checkpoint.measure(load_config(args.config, args.overrides), args.saves, args.s3 or args.folder)
    if report is not None:
        show(args, report, checkpoint.to_text(report))
    return 0


def sample_pictures(args: argparse.Namespace) -> int:
    from fitv2_scale.evaluate.from_run import sample_run

    sizes = args.size or ["256x256"]
    step = sample_run(args.run, args.out, sizes, args.columns, args.cfg, args.steps, args.seed)
    show(args, {"file": args.out, "step": step}, f"{args.out}: pictures from the EMA weights of step {step}")
    return 0


def config_show(args: argparse.Namespace) -> int:
    from fitv2_scale.config import explain, load_config

    keys = list(explain(load_config(args.config, args.overrides)))
    width = max(len(f"{key} = {value}") for key, value, _ in keys if len(str(value)) < 30)
    report = {key: {"value": value, "meaning": meaning} for key, value, meaning in keys}
    show(args, report, "\n".join(f"{f'{key} = {value}':<{width}}  # {meaning}" for key, value, meaning in keys))
    return 0
