"""fitv2 shard: write, import, inspect and verify datasets."""

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from data_sharding.errors import UserError
from fitv2_scale.cli.common import make, show

if TYPE_CHECKING:
    from data_sharding.write.write_report import WriteReport


def add(commands: Any) -> None:
    shard = commands.add_parser("shard", help="write, import, inspect and verify datasets")
    shard = shard.add_subparsers(required=True)
    write = make(shard, "write", shard_write, "encode images to latent shards")
    write.add_argument("src", metavar="SRC", help="class folders, a tar of class tars (ImageNet), or WebDataset tars")
    write.add_argument("--codec", default="dct", help="dct: weight-free block DCT (default); sd-vae: needs --vae")
    write.add_argument("--vae", default="", metavar="FOLDER", help="sd-vae: folder of a diffusers AutoencoderKL")
    write.add_argument(
        "--latent",
        choices=("mean", "sample"),
        default="mean",
        help="sd-vae: which part of its posterior (default mean)",
    )
    write.add_argument("--allow-empty", action="store_true", help="keep classes without images, and so their labels")
    write.add_argument("--max-tokens", type=int, default=256, help="maximum tokens of an image (default 256)")
    _shard_arguments(write)
    importing = make(shard, "import", shard_import, "convert the published FiTv2 latents to shards")
    importing.add_argument("src", metavar="SRC", help="folder of from_16_to_L, greater_than_L_resize and _crop")
    importing.add_argument("--max-tokens", type=int, metavar="L", help="which set, if SRC holds several")
    importing.add_argument("--classes", type=int, default=1000, help="number of classes (default 1000)")
    _shard_arguments(importing)
    inspect = make(shard, "inspect", shard_inspect, "summarize what a dataset holds")
    inspect.add_argument("url", metavar="URL", help="folder or s3:// URL of a dataset")
    inspect.add_argument("--picture", metavar="FILE", help="also save a histogram of token counts as FILE.png")
    verify = make(shard, "verify", shard_verify, "check every frame of a dataset against its digest")
    verify.add_argument("url", metavar="URL", help="folder or s3:// URL of a dataset")


def _shard_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dst", metavar="DST", help="folder of the dataset to write")
    parser.add_argument("--holdout", type=float, default=0.0, help="fraction of the images to hold out, at DST/holdout")
    parser.add_argument("--workers", type=int, help="number of processes (default: one per core)")


def shard_write(args: argparse.Namespace) -> int:
    from data_sharding.write.images import write_dataset

    options = {"holdout": args.holdout, "workers": args.workers, "vae": args.vae, "latent": args.latent}
    options["allow_empty"] = args.allow_empty
    return _written(args, write_dataset(args.src, args.dst, args.codec, args.max_tokens, **options))


def shard_import(args: argparse.Namespace) -> int:
    from data_sharding.write.import_latents import import_dataset

    return _written(
        args,
        import_dataset(args.src, args.dst, args.max_tokens, args.holdout, args.workers, classes=args.classes),
    )


def _written(args: argparse.Namespace, report: "WriteReport") -> int:
    from data_sharding.write.write_report import to_text

    show(args, asdict(report), to_text(report))
    if report.skipped:
        raise UserError(
            f"{report.skipped} of the images cannot be read and were left out, all others are written; "
            f"{report.url}/skipped.json lists the reasons"
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
    rate = f"{report.bytes / 1e6:.1f} MB at {report.mb_per_second:.0f} MB/s"
    good = f"{args.url}: no problems, {rate}"
    show(args, asdict(report), "\n".join(report.problems) or good)
    if report.problems:
        raise UserError(f"{args.url}: {len(report.problems)} problems; restore the listed files or write them again")
    return 0
