"""The command line: parse, call, print. Every report takes --json; a user's error is one sentence and exit code 2."""

import argparse
import faulthandler
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from data_sharding.errors import RanksMissing, UserError
from data_sharding.launched import speaks_for_node
from data_sharding.standard_streams import ReaderGone, reporting
from fitv2_scale.cli import (
    bench,
    checkpoint,
    cluster,
    config,
    curves,
    evaluate,
    plan,
    sample,
    shard,
    status,
    track,
    train,
    validate,
)
from fitv2_scale.cli.common import tell_ranks
from fitv2_scale.run.run import BAD_INPUT, RETRY
from launchers.rank import become_a_rank

_IN_ORDER = (shard, plan, config, train, status, cluster, checkpoint, track, curves, bench, sample, validate, evaluate)


def main(argv: list[str] | None = None) -> int:
    return exit_code_of(lambda: run_command(sys.argv[1:] if argv is None else argv))


def run_command(words: list[str]) -> int:
    args = _parse(words)
    if getattr(args, "on_ranks", False):
        args.launcher = become_a_rank()
    code = args.command(args)
    sys.stdout.flush()  # what has no reader, or no room, fails here
    return code


def exit_code_of(act: Callable[[], int]) -> int:
    """Calls ``act``; a user's error is printed, on the rank where it arose. What kills the process, such as a mapped
    file that cannot be read (SIGBUS), leaves the stacks of its threads on standard error."""
    with reporting():
        if not faulthandler.is_enabled():
            faulthandler.enable(2)
        try:
            return act()
        except UserError as error:
            told = os.environ.get("RANK", "0")
            rank = int(told) if told.isdecimal() else 0  # it is none: then that is the error
            if (sentence := error.said_by(rank, speaks_for_node(os.environ))) is not None:
                print(f"fitv2: {sentence}", file=sys.stderr)
            return RETRY if isinstance(error, RanksMissing) else BAD_INPUT
        except ReaderGone:  # a pager has seen enough
            return 1
        except KeyboardInterrupt:
            print("fitv2: interrupted", file=sys.stderr)
            return 130


def _parse(words: list[str]) -> argparse.Namespace:
    """key=value may stand anywhere, also behind an option; what stands behind -- is another command (see submit)."""
    cut = words.index("--") if "--" in words else len(words)
    parser = _parser()
    args, unknown = parser.parse_known_args(words[:cut])
    if any(word.startswith("-") or not hasattr(args, "overrides") for word in unknown):
        parser.refuse(f"unrecognized arguments: {' '.join(unknown)}", getattr(args, "on_ranks", False))
    if unknown:
        args.overrides = [*args.overrides, *unknown]
    if cut < len(words):
        if not hasattr(args, "behind"):
            parser.error("only `fitv2 submit` takes a command behind --")
        args.behind = words[cut + 1 :]
    return args


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.refuse(message, self.get_default("on_ranks"))

    def refuse(self, message: str, on_ranks: bool) -> NoReturn:
        """Exits with usage and message; tells the other ranks, if they join in this command."""
        if on_ranks:
            become_a_rank()
            try:
                tell_ranks(UserError(f"{self.prog}: {message}"))
            except UserError as error:
                if error.origin:
                    raise
        super().error(message)


def _parser() -> _Parser:
    parser = _Parser(prog="fitv2", description="Train FiTv2 on images of any resolution, at any scale.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for part in _IN_ORDER:
        part.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
