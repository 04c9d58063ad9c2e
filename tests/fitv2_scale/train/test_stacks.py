"""What a rank leaves when it hangs."""

from types import SimpleNamespace

from fitv2_scale.train.stacks import write_stacks


def test_stacks_are_written_and_taken_to_the_run(tmp_path):
    sent = []
    run = SimpleNamespace(local_path=lambda rel: tmp_path / rel, upload=sent.append)
    write_stacks(SimpleNamespace(run=run, path="attempts/2"), 7)
    name = "attempts/2/logs/rank-00007"
    assert "test_stacks_are_written_and_taken_to_the_run" in (tmp_path / f"{name}.stacks").read_text()
    assert sent[0] == f"{name}.stacks" and set(sent[1:]) <= {f"{name}.gloo.json", f"{name}.nccl.json"}
    assert all((tmp_path / file).exists() for file in sent)


def test_a_disk_that_takes_none_is_passed_over(tmp_path):
    (tmp_path / "attempts").touch()
    run = SimpleNamespace(local_path=lambda rel: tmp_path / rel, upload=None)
    write_stacks(SimpleNamespace(run=run, path="attempts/2"), 7)
