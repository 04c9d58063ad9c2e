"""fitv2 plan: what a run will need in memory, time and storage."""

import argparse
from typing import Any

from data_sharding.errors import UserError
from fitv2_scale.cli.common import config_arguments, make, show


def add(commands: Any) -> None:
    plan = make(commands, "plan", plan_run, "forecast memory, time and storage of a run")
    config_arguments(plan)
    plan.add_argument("--nodes", type=int, default=1, help="number of nodes (default 1)")
    plan.add_argument("--gpus-per-node", type=int, default=1, help="GPUs per node, one rank each (default 1)")
    plan.add_argument("--gpu", metavar="NAME", help="the GPU, as in H100 (default: that of --bench, or H200)")
    rests = plan.add_argument_group("assumptions for time and goodput; the report names the source of each")
    rests.add_argument(
        "--bench",
        action="append",
        default=[],
        metavar="FILE",
        help="output of `fitv2 bench step --json` or `fitv2 bench checkpoint --json`; may be repeated",
    )
    rests.add_argument("--mfu", type=float, metavar="SHARE", help="fraction of the GPU's peak, without a bench")
    rests.add_argument("--network", type=float, metavar="GB/S", help="bandwidth between nodes, per GPU")
    rests.add_argument("--failures", type=float, metavar="RATE", help="failures per node and day, as in 0.0065")
    rests.add_argument("--detect", type=float, metavar="SECONDS", help="from a failure to the end of its job")
    rests.add_argument("--restart", type=float, metavar="SECONDS", help="from there until training continues")


def plan_run(args: argparse.Namespace) -> int:
    from fitv2_scale.config.load import load_config
    from fitv2_scale.planning.forecast.assumptions import Assumptions
    from fitv2_scale.planning.forecast.disk_usage import commit_bytes
    from fitv2_scale.planning.forecast.plan_report import forecast, to_text

    if args.nodes < 1 or args.gpus_per_node < 1:
        raise UserError("give at least 1 as --nodes and --gpus-per-node")
    config = load_config(args.config, args.overrides)
    assumptions = Assumptions()
    if args.bench:
        assumptions = assumptions.with_benchmarks(args.bench, commit_bytes(config))
    assumptions = assumptions.on_gpu(args.gpu).with_given(
        mfu=args.mfu,
        network=args.network and 1e9 * args.network,
        failures_per_node_day=args.failures,
        detect_seconds=args.detect,
        restart_seconds=args.restart,
    )
    report = forecast(config, args.nodes, args.gpus_per_node, assumptions)
    show(args, report, to_text(report))
    return 0
