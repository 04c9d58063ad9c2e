"""The command line: parse, call, print. Every report takes --json; a user's error is one sentence and exit code 2."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from data_sharding.errors import UserError
from launchers.commands import add_commands, supervised, watch

# Heavy imports (torch) stand inside the commands that need them: `fitv2 --help` answers at once.


def main(argv: list[str] | None = None) -> int:
    args = _parse(sys.argv[1:] if argv is None else argv)
    try:
        return args.command(args)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # raised alike on all ranks, said once
            print(f"fitv2: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, a pager perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parse(words: list[str]) -> argparse.Namespace:
    """key=value may stand anywhere, also behind an option; what stands behind -- is another command (see submit)."""
    cut = words.index("--") if "--" in words else len(words)
    parser = _parser()
    args, unknown = parser.parse_known_args(words[:cut])
    if any(word.startswith("-") or not hasattr(args, "overrides") for word in unknown):
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if unknown:
        args.overrides = [*args.overrides, *unknown]
    if cut < len(words):
        if not hasattr(args, "behind"):
            parser.error("only `fitv2 submit` takes a command behind --")
        args.behind = words[cut + 1 :]
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fitv2", description="Train FiTv2 on images of any resolution, at any scale.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    shard = commands.add_parser("shard", help="write, import, inspect and verify datasets")
    shard = shard.add_subparsers(required=True)
    write = _command(shard, "write", _shard_write, "encode images to latent shards")
    write.add_argument("src", metavar="SRC", help="class folders, a tar of class tars (ImageNet), or WebDataset tars")
    write.add_argument("--codec", default="dct", help="dct: weight-free block DCT (default); sd-vae: needs --vae")
    write.add_argument("--vae", default="", metavar="FOLDER", help="sd-vae: folder of a diffusers AutoencoderKL")
    write.add_argument(
        "--latent", choices=("mean", "sample"), default="mean", help="sd-vae: of its posterior (default mean)"
    )
    write.add_argument("--max-tokens", type=int, default=256, help="most tokens an image may have (default 256)")
    _shard_arguments(write)
    importing = _command(shard, "import", _shard_import, "convert the published FiTv2 latents to shards")
    importing.add_argument("src", metavar="SRC", help="folder of from_16_to_L, greater_than_L_resize and _crop")
    importing.add_argument("--max-tokens", type=int, metavar="L", help="which set, where SRC holds several")
    importing.add_argument("--classes", type=int, default=1000, help="number of classes (default 1000)")
    _shard_arguments(importing)
    inspect = _command(shard, "inspect", _shard_inspect, "say what a dataset holds")
    inspect.add_argument("url", metavar="URL")
    inspect.add_argument("--picture", metavar="FILE", help="also draw the histogram of lengths to FILE.png")
    verify = _command(shard, "verify", _shard_verify, "check every frame of a dataset against its digest")
    verify.add_argument("url", metavar="URL")

    plan = _command(commands, "plan", _plan, "say what a run will need before it is started")
    _config_arguments(plan)
    plan.add_argument("--nodes", type=int, default=1)
    plan.add_argument("--gpus-per-node", type=int, default=1)

    train = commands.add_parser("train", help="train in the processes this is started in (plain or torchrun)")
    train.set_defaults(command=_train)
    _config_arguments(train)
    train.add_argument("--fork-from", metavar="RUN@STEP", help="begin a new run at another one's commit")
    train.add_argument("--supervise", action="store_true", help="start the processes here, and again until all is done")
    train.add_argument("--processes", type=int, metavar="N", help="with --supervise (default: one a GPU, else 1)")

    status = _command(commands, "status", _status, "attempts and commits of a run")
    status.add_argument("run", metavar="RUN")
    status.add_argument("--watch", action="store_true", help="again every 5 seconds, until Ctrl-C")
    add_commands(commands, _command, _print)

    checkpoint = commands.add_parser("checkpoint", help="list, verify, sweep, import, export")
    checkpoint = checkpoint.add_subparsers(required=True)
    listing = _command(checkpoint, "list", _checkpoint_list, "the commits of a run")
    listing.add_argument("run", metavar="RUN")
    check = _command(checkpoint, "verify", _checkpoint_verify, "check every file of every commit against its digest")
    check.add_argument("run", metavar="RUN")
    sweep = _command(checkpoint, "sweep", _checkpoint_sweep, "say what killed attempts left behind, and delete it")
    sweep.add_argument("run", metavar="RUN")
    sweep.add_argument("--yes", action="store_true", help="delete it; otherwise it is only listed")
    importing = _command(checkpoint, "import", _checkpoint_import, "make a run from public weights")
    importing.add_argument("file", metavar="FILE", help=".safetensors or .bin, float32")
    importing.add_argument("run", metavar="RUN", help="folder of the run to make")
    importing.add_argument("--config", required=True, help="config with the weights' model")
    export = _command(checkpoint, "export", _checkpoint_export, "write a commit's weights under their public names")
    export.add_argument("run", metavar="RUN")
    export.add_argument("file", metavar="FILE.safetensors")
    export.add_argument("--ema", action="store_true", help="the averaged weights instead of the raw ones")
    export.add_argument("--step", type=int, help="of this commit instead of the newest")

    track = commands.add_parser("track", help="MLflow").add_subparsers(required=True)
    sync = _command(track, "sync", _track_sync, "publish a run's journal to MLflow, from anywhere")
    sync.add_argument("run", metavar="RUN")
    sync.add_argument("--uri", help="tracking URI (default: the one in the run's config)")

    bench = commands.add_parser("bench", help="measure this machine and this program").add_subparsers(required=True)
    data = _command(bench, "data", _bench_data, "balance, packing and planning on ImageNet-like lengths")
    data.add_argument("--steps", type=int, help="steps a figure is averaged over (default: an epoch)")
    data.add_argument("--only", metavar="PART,…", help="of balance, any_ranks, nodes, bias, planning and scale")
    data.add_argument("--long", action="store_true", help="scale: also a dataset of 100 M images; needs 2 GB in TMPDIR")
    against = data.add_argument_group("the loader beside others, instead of the plan's figures")
    against.add_argument("--against", nargs="+", metavar="LOADER", help="all, or of webdataset, streaming and files")
    against.add_argument("--images", type=int, default=8192, help="latents written for it (default 8192)")
    against.add_argument("--repeats", type=int, default=3, help="rounds of all loaders in turn (default 3)")
    against.add_argument("--seconds", type=float, default=2.0, help="least time of the later epochs (default 2)")
    against.add_argument("--folder", metavar="FOLDER", help="keeps the latents (default: a temporary folder)")
    against.add_argument("--s3", metavar="s3://…", help="reads from below this new prefix instead of the local disk")

    stepping = _command(bench, "step", _bench_step, "a training step: speed, where its time goes, memory")
    _config_arguments(stepping)
    stepping.add_argument("--steps", type=int, default=8, help="steps a round (default 8)")
    stepping.add_argument("--repeats", type=int, default=3, help="rounds, of which medians are taken (default 3)")
    stepping.add_argument("--against", choices=["reference"], help="the released way of training, in turn with ours")

    saving = _command(bench, "checkpoint", _bench_checkpoint, "saving and loading: stall, speed, other layouts")
    _config_arguments(saving)
    saving.add_argument("--saves", type=int, default=3, help="rounds, of which medians are taken (default 3)")
    place = saving.add_mutually_exclusive_group()
    place.add_argument("--folder", metavar="FOLDER", help="saves below it (default: a temporary folder)")
    place.add_argument("--s3", metavar="s3://…", help="saves below this prefix")

    sample = _command(commands, "sample", _sample, "make pictures from a run's EMA weights")
    sample.add_argument("run", metavar="RUN")
    sample.add_argument("--size", action="append", metavar="HxW", help="pixels, multiples of 16; may be repeated")
    sample.add_argument("--columns", type=int, default=8, help="classes shown, spread evenly (default 8)")
    sample.add_argument("--cfg", type=float, default=1.5, help="guidance scale (default 1.5)")
    sample.add_argument("--steps", type=int, default=50, help="Euler steps (default 50)")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--out", default="samples.png", metavar="FILE")

    show = commands.add_parser("config", help="the resolved config").add_subparsers(required=True)
    shown = _command(show, "show", _config_show, "every key with its value and what it means")
    _config_arguments(shown)
    return parser


def _command(commands: Any, name: str, run: Callable, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(command=run)
    return parser


def _shard_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dst", metavar="DST", help="folder of the dataset to write")
    parser.add_argument("--holdout", type=float, default=0.0, help="share of images set aside at DST/holdout")
    parser.add_argument("--workers", type=int, help="processes (default: all cores)")


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file, as in configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as in train.steps=1000")


def _print(args: argparse.Namespace, report: Any, text: str) -> None:
    print(json.dumps(report, indent=2) if args.json else text)


def _shard_write(args: argparse.Namespace) -> int:
    from data_sharding.write import write_dataset

    options = {"holdout": args.holdout, "workers": args.workers, "vae": args.vae, "latent": args.latent}
    return _written(args, write_dataset(args.src, args.dst, args.codec, args.max_tokens, **options))


def _shard_import(args: argparse.Namespace) -> int:
    from data_sharding.import_latents import import_dataset

    return _written(
        args,
        import_dataset(args.src, args.dst, args.max_tokens, args.holdout, args.workers, classes=args.classes),
    )


def _written(args: argparse.Namespace, report: Any) -> int:
    held_out = f", {report.held_out} of them held out" if report.held_out else ""
    _print(
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


def _shard_inspect(args: argparse.Namespace) -> int:
    from data_sharding import inspect

    figures = inspect.inspect(args.url)
    if args.picture:
        inspect.save_picture(figures, args.picture)
    _print(args, figures, inspect.to_text(figures))
    return 0


def _shard_verify(args: argparse.Namespace) -> int:
    from data_sharding.verify import verify

    report = verify(args.url)
    rate = f"{report.bytes / 1e6:.1f} MB at {report.bytes / 1e6 / report.seconds:.0f} MB/s"
    good = f"{args.url}: all is well, {rate}"
    _print(args, asdict(report), "\n".join(report.problems) or good)
    if report.problems:
        raise UserError(
            f"{args.url}: {len(report.problems)} problems found; restore the files named or write them anew"
        )
    return 0


def _plan(args: argparse.Namespace) -> int:
    from fitv2_scale.config import load_config
    from fitv2_scale.forecast import forecast, to_text

    report = forecast(load_config(args.config, args.overrides), args.nodes * args.gpus_per_node)
    _print(args, report, to_text(report))
    return 0


def _train(args: argparse.Namespace) -> int:
    from fitv2_scale.config import load_config
    from fitv2_scale.train import train

    config = load_config(args.config, args.overrides)
    return supervised(args, config) if args.supervise else train(config, args.fork_from)


def _status(args: argparse.Namespace) -> int:
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
    _print(args, report, "\n".join(lines))
    return 0


def _checkpoint_list(args: argparse.Namespace) -> int:
    from fitv2_scale.run import Run

    commits = Run.open(args.run).log.commits()
    report = [
        {"step": e.fields["step"], "time": e.time, "attempt": e.attempt, "path": e.fields["path"]} for e in commits
    ]
    _print(args, report, "\n".join(f"step {c['step']:>8}  {c['time']}  {c['path']}" for c in report) or "no commit yet")
    return 0


def _checkpoint_verify(args: argparse.Namespace) -> int:
    from fitv2_scale.checkpoint.checkpointer import verify_commit
    from fitv2_scale.run import Run

    run = Run.open(args.run)
    report = [{"step": entry.fields["step"], "problems": verify_commit(run, entry)} for entry in run.log.commits()]
    _print(args, report, "\n".join(f"step {c['step']:>8}  {'; '.join(c['problems']) or 'whole'}" for c in report))
    if bad := [str(c["step"]) for c in report if c["problems"]]:
        raise UserError(f"{args.run}: the commits at step {', '.join(bad)} are not whole; training passes over them")
    return 0


def _checkpoint_sweep(args: argparse.Namespace) -> int:
    from fitv2_scale.checkpoint.sweep import leftovers, remove
    from fitv2_scale.run import Run

    run = Run.open(args.run)
    found = leftovers(run)
    if args.yes:
        remove(run, found)
    lines = [f"{folder}: saved by an attempt that ended, never committed" for folder in found.abandoned]
    lines += [f"{folder}: a retired commit" for folder in found.retired]
    lines += [f"{path}: an unfinished upload" for path, _ in found.uploads]
    if lines:
        lines.append("all deleted" if args.yes else "--yes deletes these")
    _print(args, asdict(found) | {"deleted": args.yes}, "\n".join(lines) or "nothing is left over")
    return 0


def _checkpoint_import(args: argparse.Namespace) -> int:
    from fitv2_scale.checkpoint.weights import WrongWeights, import_weights
    from fitv2_scale.config import load_config

    try:
        run = import_weights(args.file, args.run, load_config(args.config))
    except WrongWeights as error:
        if args.json:
            print(json.dumps({"missing": error.missing, "left_over": error.left_over}, indent=2))
        raise
    _print(args, {"run": run.url, "step": 0}, f"{run.url}: holds {args.file} as its commit at step 0")
    return 0


def _checkpoint_export(args: argparse.Namespace) -> int:
    from fitv2_scale.checkpoint.weights import export_weights

    step = export_weights(args.run, args.file, args.ema, args.step)
    kind = "EMA weights" if args.ema else "weights"
    _print(args, {"file": args.file, "step": step, "ema": args.ema}, f"{args.file}: the {kind} of step {step}")
    return 0


def _track_sync(args: argparse.Namespace) -> int:
    from fitv2_scale.run import Run
    from fitv2_scale.tracking.uploader import sync

    tracking = Run.open(args.run).config["tracking"]
    report = sync(args.run, args.uri or tracking["uri"], tracking["experiment"])
    sent = f"{report['metrics']} metrics and {report['pictures']} pictures sent"
    _print(args, report, f"{args.run}: {sent}, MLflow at {report['uri']} has all that is committed")
    return 0


def _bench_data(args: argparse.Namespace) -> int:
    if args.against:
        from fitv2_scale.bench import loaders

        report = loaders.measure(args.against, args.images, args.repeats, args.seconds, args.folder, args.s3)
        _print(args, report, loaders.to_text(report))
        return 0
    from fitv2_scale.bench import data_figures

    report = data_figures.measure(args.only.split(",") if args.only else data_figures.PARTS, args.steps, args.long)
    _print(args, report, data_figures.to_text(report))
    return 0


def _bench_step(args: argparse.Namespace) -> int:
    from fitv2_scale.bench import step
    from fitv2_scale.config import load_config

    config = load_config(args.config, args.overrides)
    report = step.measure(config, args.steps, args.repeats, args.against == "reference")
    if report is not None:
        _print(args, report, step.to_text(report))
    return 0


def _bench_checkpoint(args: argparse.Namespace) -> int:
    from fitv2_scale.bench import checkpoint
    from fitv2_scale.config import load_config

    if args.s3 and not args.s3.startswith("s3://"):
        raise UserError(f"--s3 {args.s3}: give s3://BUCKET/FOLDER")
    if args.saves < 1:
        raise UserError(f"--saves {args.saves}: give at least 1")
    report = checkpoint.measure(load_config(args.config, args.overrides), args.saves, args.s3 or args.folder)
    if report is not None:
        _print(args, report, checkpoint.to_text(report))
    return 0


def _sample(args: argparse.Namespace) -> int:
    from fitv2_scale.evaluate.from_run import sample_run

    sizes = args.size or ["256x256"]
    step = sample_run(args.run, args.out, sizes, args.columns, args.cfg, args.steps, args.seed)
    _print(args, {"file": args.out, "step": step}, f"{args.out}: pictures from the EMA weights of step {step}")
    return 0


def _config_show(args: argparse.Namespace) -> int:
    from fitv2_scale.config import explain, load_config

    keys = list(explain(load_config(args.config, args.overrides)))
    width = max(len(f"{key} = {value}") for key, value, _ in keys if len(str(value)) < 30)
    report = {key: {"value": value, "meaning": meaning} for key, value, meaning in keys}
    _print(args, report, "\n".join(f"{f'{key} = {value}':<{width}}  # {meaning}" for key, value, meaning in keys))
    return 0


if __name__ == "__main__":
    sys.exit(main())
