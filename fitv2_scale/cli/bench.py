"""fitv2 bench: measures the plan, the loader, many ranks' work, a training step and a commit on this machine, and
predicts a step on a GPU."""

import argparse
from typing import Any

from data_sharding.errors import UserError
from fitv2_scale.cli.common import before_joining, config_arguments, make, show, whole


def add(commands: Any) -> None:
    bench = commands.add_parser("bench", help="measure speed and memory on this machine").add_subparsers(required=True)
    data = make(bench, "data", bench_data, "measure balance, packing and planning on ImageNet-like lengths")
    data.add_argument("--steps", type=int, help="steps to average over (default: an epoch)")
    data.add_argument("--only", metavar="PART,…", help="some of balance, any_ranks, nodes, bias, planning, scale")
    data.add_argument("--long", action="store_true", help="scale: also a dataset of 100 M images; needs 2 GB in TMPDIR")
    against = data.add_argument_group("compare the loader with others instead")
    names = "all, or some of webdataset, streaming, files; none: only this loader"
    against.add_argument("--against", nargs="*", metavar="LOADER", help=names)
    against.add_argument("--images", type=int, default=8192, help="latents to write and read (default 8192)")
    against.add_argument("--repeats", type=int, default=3, help="rounds, each of all loaders in turn (default 3)")
    against.add_argument("--seconds", type=float, default=2.0, help="minimum time of later epochs (default 2)")
    against.add_argument("--folder", metavar="FOLDER", help="folder that keeps the latents (default: a temporary one)")
    against.add_argument("--s3", metavar="s3://…", help="new prefix to read from instead of the local disk")

    scaling = make(bench, "scale", bench_scale, "measure what a rank pays for each step of many ranks, without them")
    scaling.add_argument(
        "--ranks", type=whole(1), nargs="+", metavar="R", help="numbers of ranks (default 8 64 512 1024)"
    )

    predicting = make(bench, "kernels", bench_kernels, "predict a training step on a GPU, without one")
    config_arguments(predicting)
    predicting.add_argument("--gpu", default="H200", help="the GPU (default H200)")
    predicting.add_argument("--ranks", type=whole(1), default=1, metavar="R", help="number of GPUs (default 1)")
    predicting.add_argument("--nodes", type=whole(1), default=1, metavar="N", help="on how many nodes (default 1)")
    predicting.add_argument("--tokens", type=whole(1), metavar="T", help="tokens of a pack (default: the largest)")
    predicting.add_argument("--slots", type=whole(1), metavar="I", help="image slots of a pack")
    predicting.add_argument("--table", metavar="FILE", help="add it to a table, as `fitv2 plan` has one; of one GPU")

    stepping = make(bench, "step", bench_step, "measure a training step: speed, time by part, memory", on_ranks=True)
    config_arguments(stepping)
    stepping.add_argument("--steps", type=int, default=8, help="steps per round (default 8)")
    stepping.add_argument("--repeats", type=int, default=3, help="rounds, whose medians are reported (default 3)")
    stepping.add_argument("--sweep", action="store_true", help="find out which keys of layout make a step faster here")
    stepping.add_argument("--against", choices=["reference"], help="also measure the released training step, in turn")
    stepping.add_argument(
        "--reference-checkpointing",
        choices=["none", "full"],
        help="what that one computes again in its backward pass: nothing (default, as released), or each block",
    )

    saving = make(
        bench, "checkpoint", bench_checkpoint, "measure saving and loading: stall, speed, other layouts", on_ranks=True
    )
    config_arguments(saving)
    saving.add_argument("--saves", type=int, default=3, help="rounds, whose medians are reported (default 3)")
    place = saving.add_mutually_exclusive_group()
    place.add_argument("--folder", metavar="FOLDER", help="folder to save in (default: a temporary one)")
    place.add_argument("--s3", metavar="s3://…", help="prefix to save in")


def bench_data(args: argparse.Namespace) -> int:
    if args.against is not None:
        from fitv2_scale.bench import compare_loaders

        report = compare_loaders.measure(args.against, args.images, args.repeats, args.seconds, args.folder, args.s3)
        show(args, report, compare_loaders.to_text(report))
        return 0
    from fitv2_scale.bench import data_figures

    report = data_figures.measure(args.only.split(",") if args.only else data_figures.PARTS, args.steps, args.long)
    show(args, report, data_figures.to_text(report))
    return 0


def bench_scale(args: argparse.Namespace) -> int:
    from fitv2_scale.bench import scale

    rows = scale.measure(args.ranks or scale.RANKS)
    show(args, scale.to_json(rows), scale.to_text(rows))
    return 0


def bench_kernels(args: argparse.Namespace) -> int:
    from fitv2_scale.bench.kernels.predict import add_to_table, measure
    from fitv2_scale.bench.kernels.report import to_text
    from fitv2_scale.config.load import load_config

    if args.ranks % args.nodes:
        raise UserError(f"--ranks {args.ranks} do not divide evenly among --nodes {args.nodes}")
    if args.table and args.ranks > 1:
        raise UserError("--table has predictions of one GPU: leave --ranks out")
    config = load_config(args.config, args.overrides)
    report = measure(config, args.gpu, args.ranks, args.nodes, args.tokens, args.slots)
    if args.table:
        add_to_table(args.table, config, report)
    show(args, report, to_text(report))
    return 0


def bench_step(args: argparse.Namespace) -> int:
    from fitv2_scale.bench import step, step_sweep
    from fitv2_scale.bench.step_report import to_text
    from fitv2_scale.config.load import load_config

    with before_joining():
        if args.sweep and args.against:
            raise UserError("--sweep compares configs of ours: leave --against out")
        if args.reference_checkpointing and not args.against:
            raise UserError("--reference-checkpointing needs --against reference: ours is layout.checkpointing")
        config = load_config(args.config, args.overrides)
    if args.sweep:
        found = step_sweep.measure(config, args.steps, args.repeats)
        if found is not None:
            show(args, found, step_sweep.to_text(found))
        return 0
    reference = (args.reference_checkpointing or "none") if args.against else None
    report = step.measure(config, args.steps, args.repeats, reference)
    if report is not None:
        show(args, report, to_text(report))
    return 0


def bench_checkpoint(args: argparse.Namespace) -> int:
    from fitv2_scale.bench import checkpoint
    from fitv2_scale.bench.checkpoint_report import to_text
    from fitv2_scale.config.load import load_config

    with before_joining():
        if args.s3 and not args.s3.startswith("s3://"):
            raise UserError(f"--s3 {args.s3}: give s3://BUCKET/FOLDER")
        if args.saves < 1:
            raise UserError(f"--saves {args.saves}: give at least 1")
        config = load_config(args.config, args.overrides)
    report = checkpoint.measure(config, args.saves, args.s3 or args.folder)
    if report is not None:
        show(args, report, to_text(report))
    return 0
