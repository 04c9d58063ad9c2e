"""fitv2 config show: every key of a config."""

import argparse
from typing import Any

from fitv2_scale.cli.common import config_arguments, make, show


def add(commands: Any) -> None:
    config = commands.add_parser("config", help="show a config").add_subparsers(required=True)
    config_arguments(make(config, "show", config_show, "show every key of a config with its value and meaning"))


def config_show(args: argparse.Namespace) -> int:
    from fitv2_scale.config.load import explain, load_config

    keys = list(explain(load_config(args.config, args.overrides)))
    width = max(len(f"{key} = {value}") for key, value, _ in keys if len(str(value)) < 30)
    report = {key: {"value": value, "meaning": meaning} for key, value, meaning in keys}
    show(args, report, "\n".join(f"{f'{key} = {value}':<{width}}  # {meaning}" for key, value, meaning in keys))
    return 0
