"""What all commands share: how they are declared, and how their reports are shown."""

import argparse
import json
from collections.abc import Callable
from typing import Any


def make(commands: Any, name: str, run: Callable, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(command=run)
    return parser


def config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file, as in configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as in train.steps=1000")


def run_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run's folder, or its s3:// URL")


def show(args: argparse.Namespace, report: Any, text: str) -> None:
    print(json.dumps(report, indent=2) if args.json else text)
