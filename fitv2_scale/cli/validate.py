"""fitv2 validate: the loss of trained weights on held-out images."""

import argparse
from typing import Any

from fitv2_scale.cli.common import make, show


def add(commands: Any) -> None:
    validate = make(
        commands, "validate", validate_weights, "compute the loss of EMA weights on held-out images", on_ranks=True
    )
    validate.add_argument("weights", metavar="RUN_OR_WEIGHTS", help="RUN, RUN@STEP, or .safetensors/.bin with --config")
    validate.add_argument("overrides", nargs="*", metavar="key=value", help="as in validation.images=1000")
    validate.add_argument("--config", metavar="FILE", help="the config of a weights file")


def validate_weights(args: argparse.Namespace) -> int:
    from fitv2_scale.evaluate.sampling.load_weights import open_weights
    from fitv2_scale.parallel.agreement import agree, read_alike
    from fitv2_scale.parallel.rank_facts import command_facts, read_data, software_facts
    from fitv2_scale.parallel.world import join
    from fitv2_scale.train.in_loop_eval import validation_of

    with join() as world:
        agree(world, command_facts(args) | software_facts(world.device))
        with open_weights(args.weights, world, args.config, args.overrides) as weights:
            weights.header()  # raises if its data would have other classes
            layout, data = read_alike(world, lambda: read_data(weights.config, world))
            validation = validation_of(weights.config, data, world, layout)
            loss, name = validation.loss(weights.engine.network), weights.name
        if world.is_first:
            report = {"weights": name, "step": weights.step, "val_loss_ema": loss, "images": validation.images}
            show(args, report, f"{name}: loss {loss:.6f} on {validation.images} held-out images, EMA weights")
    return 0
