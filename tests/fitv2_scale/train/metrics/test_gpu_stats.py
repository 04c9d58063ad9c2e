"""Memory and use of the devices, over all and by node."""

from types import SimpleNamespace

import numpy as np
import torch

from fitv2_scale.train.metrics.gpu_stats import GpuStats, by_node


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


def test_values_of_nodes_are_in_the_first_report_of_ten():
    stats = GpuStats(SimpleNamespace(device=torch.device("cuda"), hosts=["b", "b", "a"]))
    reports = [stats.metrics(np.array([10.0, 30, 20, 90, 70, 20])) for _ in range(21)]
    assert [n for n, report in enumerate(reports) if "gpu_memory_gib/node0" in report] == [0, 10, 20]
    assert all(report["gpu_memory_gib"] == 30 for report in reports)
    assert (reports[0]["gpu_memory_gib/node0"], reports[0]["gpu_memory_gib/node1"]) == (30, 20)
    without = GpuStats(SimpleNamespace(device=torch.device("cpu"), hosts=["b"]))
    assert without.metrics(without.local_values()) == {}
