"""fitv2 plan and fitv2 config: what a run will need, and what it is set to, before it is started."""

import argparse
from typing import Any

from fitv2_scale.commands.parsing import config_arguments, make, show


def add(commands: Any) -> None:
    plan = make(commands, "plan", plan_run, "say what a run will need before it is started")
    config_arguments(plan)
    plan.add_argument("--nodes", type=int, default=1)
    plan.add_argument("--gpus-per-node", type=int, default=1)

    config = commands.add_parser("config", help="the resolved config").add_subparsers(required=True)
    shown = make(config, "show", config_show, "every key with its value and what it means")
    config_arguments(shown)


def plan_run(args: argparse.Namespace) -> int:
    from fitv2_scale.config import load_config
    from fitv2_scale.forecast import forecast, to_text

    report = forecast(load_config(args.config, args.overrides), args.nodes * args.gpus_per_node, args.nodes)
    show(args, report, to_text(report))
    return 0


def config_show(args: argparse.Namespace) -> int:
    from fitv2_scale.config import explain, load_config

    keys = list(explain(load_config(args.config, args.overrides)))
    width = max(len(f"{key} = {value}") for key, value, _ in keys if len(str(value)) < 30)
    report = {key: {"value": value, "meaning": meaning} for key, value, meaning in keys}
    show(args, report, "\n".join(f"{f'{key} = {value}':<{width}}  # {meaning}" for key, value, meaning in keys))
    return 0
