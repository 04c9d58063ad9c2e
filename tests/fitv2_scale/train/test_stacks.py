"""What a rank leaves when it hangs."""

from types import SimpleNamespace

import torch
from torch._C import _distributed_c10d

from fitv2_scale.train.stacks import write_stacks


def test_stacks_are_written_and_taken_to_the_run(tmp_path):
    sent = []
    run = SimpleNamespace(local_path=lambda rel: tmp_path / rel, upload=sent.append)
    write_stacks(SimpleNamespace(run=run, path="attempts/2"), 7, torch.device("cpu"))
    name = "attempts/2/logs/rank-00007"
    assert "test_stacks_are_written_and_taken_to_the_run" in (tmp_path / f"{name}.stacks").read_text()
    assert sent[0] == f"{name}.stacks" and set(sent[1:]) <= {f"{name}.gloo.json", f"{name}.nccl.json"}
    assert all((tmp_path / file).exists() for file in sent)


def test_a_disk_that_takes_none_is_passed_over(tmp_path):
    (tmp_path / "attempts").touch()
    run = SimpleNamespace(local_path=lambda rel: tmp_path / rel, upload=None)
    write_stacks(SimpleNamespace(run=run, path="attempts/2"), 7, torch.device("cpu"))


def test_the_collectives_are_those_of_the_rank_s_device(tmp_path, monkeypatch):
    """Not those of what torch could use: a rank may compute on the CPU beside a GPU."""
    for program in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        monkeypatch.setattr(_distributed_c10d, program, program.encode, raising=False)
    run = SimpleNamespace(local_path=lambda rel: tmp_path / rel, upload=lambda rel: None)
    for device, name, program in (("cpu", "gloo", b"_dump_fr_trace_json"), ("cuda", "nccl", b"_dump_nccl_trace_json")):
        write_stacks(SimpleNamespace(run=run, path=device), 7, torch.device(device))
        assert (tmp_path / device / f"logs/rank-00007.{name}.json").read_bytes() == program
        assert len(list((tmp_path / device / "logs").iterdir())) == 2
