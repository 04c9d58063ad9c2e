"""Notifications: what they run, and the sentence if it fails."""

from launchers.notify import run_event_command, sync_mlflow


def test_a_sync_that_fails_is_told_with_its_command(tmp_path, capfd):
    url = str(tmp_path / "nothing")
    assert sync_mlflow(url).endswith(f"-m fitv2_scale.cli track sync {url}: exit code 2")
    assert url in capfd.readouterr().err


def test_an_event_command_gets_event_run_and_reason(tmp_path):
    file = tmp_path / "told"
    assert run_event_command(f"printf '%s|' >>{file}", "done", "RUN", "all 'steps'") is None
    assert file.read_text() == "done|RUN|all 'steps'|"
    assert run_event_command("", "done", "RUN", "why") is None
    assert run_event_command("exit 3 #", "done", "RUN", "why").endswith(": exit code 3")
