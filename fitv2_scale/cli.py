"""The command line: parse, call, print. Every report takes --json; a user's error is one sentence and exit code 2."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

from data_sharding.errors import UserError
from fitv2_scale import actions
from launchers.commands import add_commands


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
    write = _command(shard, "write", actions.shard_write, "encode images to latent shards")
    write.add_argument("src", metavar="SRC", help="class folders, a tar of class tars (ImageNet), or WebDataset tars")
    write.add_argument("--codec", default="dct", help="dct: weight-free block DCT (default); sd-vae: needs --vae")
    write.add_argument("--vae", default="", metavar="FOLDER", help="sd-vae: folder of a diffusers AutoencoderKL")
    write.add_argument(
        "--latent", choices=("mean", "sample"), default="mean", help="sd-vae: of its posterior (default mean)"
    )
    write.add_argument("--max-tokens", type=int, default=256, help="most tokens an image may have (default 256)")
    _shard_arguments(write)
    importing = _command(shard, "import", actions.shard_import, "convert the published FiTv2 latents to shards")
    importing.add_argument("src", metavar="SRC", help="folder of from_16_to_L, greater_than_L_resize and _crop")
    importing.add_argument("--max-tokens", type=int, metavar="L", help="which set, where SRC holds several")
    importing.add_argument("--classes", type=int, default=1000, help="number of classes (default 1000)")
    _shard_arguments(importing)
    inspect = _command(shard, "inspect", actions.shard_inspect, "say what a dataset holds")
    inspect.add_argument("url", metavar="URL")
    inspect.add_argument("--picture", metavar="FILE", help="also draw the histogram of lengths to FILE.png")
    verify = _command(shard, "verify", actions.shard_verify, "check every frame of a dataset against its digest")
    verify.add_argument("url", metavar="URL")

    plan = _command(commands, "plan", actions.plan_run, "say what a run will need before it is started")
    _config_arguments(plan)
    plan.add_argument("--nodes", type=int, default=1)
    plan.add_argument("--gpus-per-node", type=int, default=1)

    train = commands.add_parser("train", help="train in the processes this is started in (plain or torchrun)")
    train.set_defaults(command=actions.train_run)
    _config_arguments(train)
    train.add_argument("--fork-from", metavar="RUN@STEP", help="begin a new run at another one's commit")
    train.add_argument("--supervise", action="store_true", help="start the processes here, and again until all is done")
    train.add_argument("--processes", type=int, metavar="N", help="with --supervise (default: one a GPU, else 1)")

    status = _command(commands, "status", actions.status, "attempts and commits of a run")
    status.add_argument("run", metavar="RUN")
    status.add_argument("--watch", action="store_true", help="again every 5 seconds, until Ctrl-C")
    add_commands(commands, _command, actions.show)

    checkpoint = commands.add_parser("checkpoint", help="list, verify, sweep, import, export")
    checkpoint = checkpoint.add_subparsers(required=True)
    listing = _command(checkpoint, "list", actions.checkpoint_list, "the commits of a run")
    listing.add_argument("run", metavar="RUN")
    check = _command(
        checkpoint, "verify", actions.checkpoint_verify, "check every file of every commit against its digest"
    )
    check.add_argument("run", metavar="RUN")
    sweep = _command(
        checkpoint, "sweep", actions.checkpoint_sweep, "say what killed attempts left behind, and delete it"
    )
    sweep.add_argument("run", metavar="RUN")
    sweep.add_argument("--yes", action="store_true", help="delete it; otherwise it is only listed")
    importing = _command(checkpoint, "import", actions.checkpoint_import, "make a run from public weights")
    importing.add_argument("file", metavar="FILE", help=".safetensors or .bin, float32")
    importing.add_argument("run", metavar="RUN", help="folder of the run to make")
    importing.add_argument("--config", required=True, help="config with the weights' model")
    export = _command(
        checkpoint, "export", actions.checkpoint_export, "write a commit's weights under their public names"
    )
    export.add_argument("run", metavar="RUN")
    export.add_argument("file", metavar="FILE.safetensors")
    export.add_argument("--ema", action="store_true", help="the averaged weights instead of the raw ones")
    export.add_argument("--step", type=int, help="of this commit instead of the newest")

    track = commands.add_parser("track", help="MLflow").add_subparsers(required=True)
    sync = _command(track, "sync", actions.track_sync, "publish a run's journal to MLflow, from anywhere")
    sync.add_argument("run", metavar="RUN")
    sync.add_argument("--uri", help="tracking URI (default: the one in the run's config)")

    bench = commands.add_parser("bench", help="measure this machine and this program").add_subparsers(required=True)
    data = _command(bench, "data", actions.bench_data, "balance, packing and planning on ImageNet-like lengths")
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

    stepping = _command(bench, "step", actions.bench_step, "a training step: speed, where its time goes, memory")
    _config_arguments(stepping)
    stepping.add_argument("--steps", type=int, default=8, help="steps a round (default 8)")
    stepping.add_argument("--repeats", type=int, default=3, help="rounds, of which medians are taken (default 3)")
    stepping.add_argument("--against", choices=["reference"], help="the released way of training, in turn with ours")

    saving = _command(bench, "checkpoint", actions.bench_checkpoint, "saving and loading: stall, speed, other layouts")
    _config_arguments(saving)
    saving.add_argument("--saves", type=int, default=3, help="rounds, of which medians are taken (default 3)")
    place = saving.add_mutually_exclusive_group()
    place.add_argument("--folder", metavar="FOLDER", help="saves below it (default: a temporary folder)")
    place.add_argument("--s3", metavar="s3://…", help="saves below this prefix")

    sample = _command(commands, "sample", actions.sample_pictures, "make pictures from a run's EMA weights")
    sample.add_argument("run", metavar="RUN")
    sample.add_argument("--size", action="append", metavar="HxW", help="pixels, multiples of 16; may be repeated")
    sample.add_argument("--columns", type=int, default=8, help="classes shown, spread evenly (default 8)")
    sample.add_argument("--cfg", type=float, default=1.5, help="guidance scale (default 1.5)")
    sample.add_argument("--steps", type=int, default=50, help="Euler steps (default 50)")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--out", default="samples.png", metavar="FILE")

    show = commands.add_parser("config", help="the resolved config").add_subparsers(required=True)
    shown = _command(show, "show", actions.config_show, "every key with its value and what it means")
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


if __name__ == "__main__":
    sys.exit(main())
