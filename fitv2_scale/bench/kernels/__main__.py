"""The processes of `fitv2 bench kernels`: what to count comes as JSON on standard input, the counts go to standard
output. A user's error is one sentence on standard error and exit code 2."""

import json
import sys
from dataclasses import asdict
from typing import Any

from data_sharding.errors import UserError
from data_sharding.plan.pack_layout import PackShape
from fitv2_scale.config.schema import Config
from fitv2_scale.run.run import BAD_INPUT


def _count(asked: dict[str, Any]) -> Any:
    config, shape = Config.model_validate(asked["config"]), PackShape(**asked["shape"])
    if asked["what"] == "block":
        from fitv2_scale.bench.kernels.compile_block import compile_block
        from fitv2_scale.bench.kernels.gpus import gpu_named

        return compile_block(config, gpu_named(asked["gpu"]), shape)
    from fitv2_scale.bench.kernels.outer_step import count_outer_step

    return count_outer_step(config, asked["ranks"], asked["nodes"], shape, asked["packs"])


if __name__ == "__main__":
    try:
        print(json.dumps(asdict(_count(json.load(sys.stdin)))))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(BAD_INPUT)
