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
    from fitv2_scale.data import Data
    from fitv2_scale.evaluate.sampling.load_weights import open_weights
    from fitv2_scale.parallel.world import join
    from fitv2_scale.train.in_loop_eval import validation_of

    with join() as world, open_weights(args.weights, world, args.config, args.overrides) as weights:
        config, layout = weights.config, weights.layout
        data = Data.open(config, layout.nodes(world.hosts()))
        validation = validation_of(config, data, world, layout)
        loss = validation.loss(weights.engine.network)
        if world.is_first:
            report = {"weights": weights.name, "step": weights.step, "val_loss_ema": loss, "images": validation.images}
            show(args, report, f"{weights.name}: loss {loss:.6f} on {validation.images} held-out images, EMA weights")
    return 0
