"""What the commands share: declaring a command, types of arguments, printing a report."""

import argparse
import json
import os
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data_sharding.errors import RanksMissing, UserError

SAMPLING_FLAGS = ("cfg", "guided_channels", "solver", "steps", "rope", "attention_scale", "sincos")
_POSITION_FLAGS = {"rope": ("rope", "attention_scale"), "sincos": ("sincos",)}  # by the model's position


def make(commands: Any, name: str, run: Callable, text: str, on_ranks: bool = False) -> argparse.ArgumentParser:
    """``on_ranks``: if several processes are started with it, they work together."""
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(command=run, on_ranks=on_ranks)
    return parser


def config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file, as in configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as in train.steps=1000")


def run_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run's folder, or its s3:// URL")


@contextmanager
def before_joining() -> Generator[None]:
    """For what a command does in each of several ranks before they join. If it fails on one of them, the others, which
    wait for it there, are told why."""
    try:
        yield
    except Exception as error:
        tell_ranks(error)
        raise


def tell_ranks(error: Exception) -> None:
    """Joins the other ranks that a launcher has started, if there are any, to end all of them with ``error``. Raises
    it, as ``World.raise_shared`` does; returns if they do not come, or not before a signal does."""
    if {"RANK", "MASTER_ADDR"} <= os.environ.keys() and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from fitv2_scale.parallel.world import join

        with suppress(RanksMissing), join(error):
            pass


def show(args: argparse.Namespace, report: Any, text: str) -> None:
    print(json.dumps(report, indent=2) if args.json else text)


def whole(least: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number, ``least`` or more and below 2^64."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) < 1 << 64:
            raise argparse.ArgumentTypeError(f"give a whole number, {least} or more, not {text}")
        return int(text)

    return parse


def new_file(suffix: str) -> Callable[[str], str]:
    """The type of an argument that is a file to write. What would fail in the end is refused at once."""

    def parse(text: str) -> str:
        if not text.endswith(suffix):
            raise argparse.ArgumentTypeError(f"give a name that ends in {suffix}, not {text}")
        if not (folder := Path(text).parent).is_dir():
            raise argparse.ArgumentTypeError(f"there is no folder {folder}: make it, or choose another for {text}")
        return text

    return parse


def sampling_changes(args: argparse.Namespace) -> dict[str, Any]:
    """What flags like --cfg change in the config's section ``sampling``."""
    return {name: getattr(args, name) for name in SAMPLING_FLAGS if getattr(args, name) is not None}


def refuse_other_positions(args: argparse.Namespace, position: str) -> None:
    """Raises UserError if a flag is for positions of another kind than the network's."""
    for kind, flags in _POSITION_FLAGS.items():
        if kind != position:
            refuse_unused(args, flags, f"this network has model.position={position}: leave out {{}}")


def refuse_unused(args: argparse.Namespace, unused: Collection[str], sentence: str) -> None:
    """Raises UserError with ``sentence``, which has {} for the options, if any of ``unused`` was given: an option
    without an effect would be taken for one. Their defaults must be None, False or empty."""
    values = {name: getattr(args, name) for name in unused}
    given = [name for name, value in values.items() if value is not None and value is not False and value != []]
    if given:
        words = [" ".join(args.overrides) if name == "overrides" else f"--{name.replace('_', '-')}" for name in given]
        raise UserError(sentence.format(", ".join(words)))


def class_numbers(text: str, classes: int) -> list[int]:
    """What --classes asks for, as in "0,7,42". Raises UserError unless all are numbers of a model's ``classes``."""
    numbers = text.split(",")
    if not all(number.isdecimal() and int(number) < classes for number in numbers):
        raise UserError(f"--classes {text}: give numbers from 0 to {classes - 1}, separated by commas")
    return [int(number) for number in numbers]
