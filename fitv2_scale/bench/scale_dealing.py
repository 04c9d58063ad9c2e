"""What a rank pays for the dealing of all ranks' images: in each step, and when a run begins.

Lengths as ImageNet's at 256 tokens, 8 images a rank, nodes of 8 ranks, FiTv2-3B/2. Seconds are CPU seconds of the one
thread that does it, so other work on the machine counts little.
"""

import statistics
import time

from data_sharding.plan.balance import Nodes, assign_packs
from fitv2_scale.config.load import parse_config
from fitv2_scale.config.schema import Config
from fitv2_scale.data import Data

_IMAGES, _NODE = 8, 8  # of a rank; ranks
_STEPS = 32


def measure_dealing(ranks: int) -> dict[tuple[str, str], float]:
    """The rows of ``ranks``: dealing, if nodes read only their own images or hold all of them; planning; opening."""
    config = _config(ranks)
    began = time.thread_time()
    data = Data.open(config, _nodes(ranks))
    opened = time.thread_time() - began
    steps = data.plan.window_steps(0)
    began = time.thread_time()
    data.plan.step(steps)  # plans the second window
    planned = time.thread_time() - began
    return {
        ("dealing", "CPU ms a step"): _deal_ms(data, data.nodes),
        ("dealing, all data on each node", "CPU ms a step"): _deal_ms(data, (ranks,)),
        ("planning, a window at once", "CPU ms a step"): 1000 * planned / steps,
        ("opening the data", "CPU s"): opened,
    }


def _deal_ms(data: Data, nodes: Nodes) -> float:
    """The median over the first steps, of all that grows with the ranks: dealing, own packs, balance."""
    seconds = []
    for step in range(min(_STEPS, data.plan.window_steps(0))):
        tokens = data.plan.step(step).tokens
        began = time.thread_time()
        assignment = assign_packs(tokens, data.cost, nodes, data.shapes[0])
        assignment.packs_of(0)
        assignment.loads(data.cost.of(tokens)).max()
        seconds.append(time.thread_time() - began)
    return 1000 * statistics.median(seconds)


def _nodes(ranks: int) -> Nodes:
    full, rest = divmod(ranks, _NODE)
    return (_NODE,) * full + (rest,) * bool(rest)


def _config(ranks: int) -> Config:
    return parse_config(
        {
            "model": {"hidden": 2304, "depth": 40, "heads": 24},
            "data": {"url": "preset:imagenet256"},
            "batch": {"images": _IMAGES * ranks},
            "train": {"steps": 1},
        },
        "bench scale",
    )
