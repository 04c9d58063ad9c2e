"""Memory and use of the devices, over all and by node."""

import logging
from types import SimpleNamespace

import numpy as np
import pynvml
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


def test_why_a_utilisation_cannot_be_read_is_logged_once(monkeypatch, caplog):
    device, answers = torch.device("cuda", 1), iter([ModuleNotFoundError("nvidia-ml-py"), OSError("none"), 93])

    def utilization(asked: torch.device) -> int:
        assert asked == device
        if isinstance(answer := next(answers), Exception):
            raise answer
        return answer

    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 << 30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    stats = GpuStats(SimpleNamespace(device=device, hosts=["a", "a"], rank=1, size=2))
    with caplog.at_level(logging.WARNING):
        values = [stats.local_values().tolist() for _ in range(3)]
    assert str(values) == "[[0.0, 3.0, 0.0, nan], [0.0, 3.0, 0.0, nan], [0.0, 3.0, 0.0, 93.0]]"
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == (
        "gpu_utilisation is left out, since that of rank 1 cannot be read: ModuleNotFoundError('nvidia-ml-py')"
    )


def test_the_package_that_torch_reads_utilisation_with_is_installed():
    for name in ("nvmlInit", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetUtilizationRates"):
        assert callable(getattr(pynvml, name))
