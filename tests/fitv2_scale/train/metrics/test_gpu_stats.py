"""Memory and use of the devices, over all and by node."""

import numpy as np

from fitv2_scale.train.metrics.gpu_stats import by_node


def test_devices_over_nodes():
    memory, busy = np.array([10.0, 30.0, 20.0]), np.array([90.0, 70.0, 20.0])
    everyone = {"gpu_memory_gib": 30.0, "gpu_utilisation": 60.0}
    assert by_node(memory, busy, []) == by_node(memory, busy, [0, 0, 0]) == everyone
    assert by_node(memory, busy, [0, 0, 1]) == everyone | {
        "gpu_memory_gib/node0": 30.0,
        "gpu_memory_gib/node1": 20.0,
        "gpu_utilisation/node0": 80.0,
        "gpu_utilisation/node1": 20.0,
    }
    assert by_node(memory, np.full(3, np.nan), []) == {"gpu_memory_gib": 30.0}
