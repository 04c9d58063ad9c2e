"""What a RUN is: made once, continued with the same recipe only, one record for each attempt, no secret in it."""

import json
import subprocess
import sys
import threading

import pytest

from data_sharding.errors import DataError, UserError
from fitv2_scale.run.differences import differences, flatten, recipe_hash
from fitv2_scale.run.log import StaleAttempt
from fitv2_scale.run.paths import absolute_paths
from fitv2_scale.run.redact import redact
from fitv2_scale.run.run import Run
from fitv2_scale.run.status import status

RECIPE = {"model": {"depth": 4, "dim": 64}, "optim": {"lr": 1e-4}, "data": {"urls": ["a", "b"]}}
CONFIG = {**RECIPE, "log": {"every": 10}}


def make(folder, recipe=RECIPE, config=CONFIG, plan="plan-1", parent=None) -> Run:
    return Run.open_or_create(str(folder), config, recipe, plan, parent)


def test_a_run_is_made_once_and_continued(tmp_path):
    first = make(tmp_path / "demo")
    again = make(tmp_path / "demo", config={**CONFIG, "log": {"every": 99}})
    assert again == first == Run.open(str(tmp_path / "demo"))
    assert first.id.startswith("demo-") and first.id != make(tmp_path / "other").id
    record = json.loads((tmp_path / "demo" / "run.json").read_bytes())
    assert record["config"] == CONFIG and record["recipe"] == RECIPE and record["plan_hash"] == "plan-1"
    assert record["recipe_hash"] == recipe_hash(RECIPE) and record["parent"] is None


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "photos/temple").mkdir(parents=True)
    with pytest.raises(
        UserError, match=r"photos is no run, but holds 1 other files or folders \(temple\): give a new or"
    ):
        make(tmp_path / "photos")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["temple"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/.gitkeep").touch()
    (tmp_path / "empty/doctor-0a1b2c3d").mkdir()
    make(tmp_path / "empty")
    (tmp_path / "empty/run.json").unlink()  # of a run that has begun, it is made again
    (tmp_path / "empty/log").mkdir()
    make(tmp_path / "empty")


def test_a_new_name_that_reads_as_a_step_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"/a@4 would be read as step 4 of the run .*/a: give the new run another name"):
        make(tmp_path / "a@4")
    assert not (tmp_path / "a@4").exists()
    earlier = make(tmp_path / "b")  # one of an earlier version continues
    (tmp_path / "b").rename(tmp_path / "b@4")
    assert make(tmp_path / "b@4").id == earlier.id


def test_another_recipe_is_refused_with_every_difference(tmp_path):
    make(tmp_path)
    recipe = {"model": {"depth": 4, "dim": 128}, "optim": {}, "data": {"urls": ["a"]}, "seed": 1}
    with pytest.raises(UserError) as caught:
        make(tmp_path, recipe=recipe, plan="plan-2")
    said = str(caught.value)
    for difference in (
        'data.urls: ["a", "b"] -> ["a"]',
        "model.dim: 64 -> 128",
        "optim: (absent) -> {}",
        "optim.lr: 0.0001 -> (absent)",
        "seed: (absent) -> 1",
        "plan_hash: plan-1 -> plan-2",
        "--fork-from RUN@STEP",
    ):
        assert difference in said
    assert "depth" not in said


def test_another_plan_is_told_by_its_first_digits_and_what_it_means(tmp_path):
    first, second = "0123456789abcdef" + 48 * "0", "fedcba9876543210" + 48 * "1"
    make(tmp_path, plan=first)
    with pytest.raises(UserError) as refused:
        make(tmp_path, plan=second)
    assert str(refused.value) == (
        f"{tmp_path} holds a different run (plan_hash: 0123456789abcdef -> fedcba9876543210 (other data, seed or views"
        ", or another planner)); give a new run folder, or fork it with --fork-from RUN@STEP."
    )


def test_tuples_and_key_order_do_not_change_the_recipe(tmp_path):
    make(tmp_path)
    make(tmp_path, recipe={"data": {"urls": ("a", "b")}, "optim": {"lr": 1e-4}, "model": {"dim": 64, "depth": 4}})


def test_a_changed_password_is_no_change_of_recipe_and_is_stored_nowhere(tmp_path):
    for password in ("hunter2", "hunter3"):
        recipe = {"data": f"https://me:{password}@host/shards"}
        run = make(tmp_path, recipe=recipe, config={**recipe, "mlflow": {"token": password}})
    run.claim({"argv": ["fitv2", "--password", "hunter2", "uri=http://me:hunter3@h"]}).end(
        1, "http://me:hunter2@h failed"
    )
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"hunter" not in written and b"[redacted]" in written


def test_a_fork_remembers_its_parent(tmp_path):
    parent = {"run": "/runs/first", "step": 100}
    run = make(tmp_path, parent=parent)
    assert make(tmp_path, parent=parent) == make(tmp_path) == run
    assert run.parent == parent
    with pytest.raises(UserError, match=r'parent: .*"step": 100.* -> .*"step": 200'):
        make(tmp_path, parent={"run": "/runs/first", "step": 200})


def test_open_says_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match="is not a run"):
        Run.open(str(tmp_path / "nothing"))
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(DataError, match="run.json is damaged"):
        Run.open(str(tmp_path))
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(DataError, match="not what this version writes"):
        Run.open(str(tmp_path))


def test_racing_makers_agree(tmp_path):
    begin, runs = threading.Barrier(8), []

    def work() -> None:
        begin.wait()
        runs.append(make(tmp_path / "demo"))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 8 and len({run.id for run in runs}) == 1


def test_attempts_leave_records_and_status_reads_them(tmp_path):
    run = make(tmp_path, parent={"run": "/runs/first", "step": 0})
    first = run.claim({"hostname": "n1"})
    first.commit(10, "steps/10", "sha256:1")
    bad = first.commit(20, "steps/20", "sha256:2")
    first.end(75, "SIGUSR1")
    second = run.claim({})
    second.retire(bad.n)
    third = run.claim({})
    run.log.stop()
    with pytest.raises(StaleAttempt):
        second.commit(30, "steps/30", "sha256:3")

    start = json.loads((first.folder / "start.json").read_bytes())
    assert start == {"attempt": 1, "time": run.log.entries()[0].time, "hostname": "n1", "changed": []}
    end = json.loads((tmp_path / "attempts" / "1" / "end.json").read_bytes())
    assert end == first.read_end() and (end["code"], end["reason"]) == (75, "SIGUSR1")
    first.end(75, "rank 0 is lost", [0], stands_in=True)
    assert first.read_end() == end  # rank 0 has got to write it, before it was killed

    report = status(Run.open(str(tmp_path)))
    assert json.loads(json.dumps(report)) == report
    assert [(a["attempt"], a["code"], a["why"], a["last_step"]) for a in report["attempts"]] == [
        (1, 75, "SIGUSR1", 20),
        (2, None, "killed", None),
        (third.number, None, "killed or still running", None),
    ]
    assert report["last_commit"]["step"] == 10 and report["last_commit"]["path"] == "steps/10"
    assert report["stop_requested"] and report["parent"] == {"run": "/runs/first", "step": 0}


def test_status_of_a_run_never_started(tmp_path):
    report = status(make(tmp_path))
    assert report["attempts"] == [] and report["last_commit"] is None


def test_reports_need_no_torch():
    check = "import sys, fitv2_scale.run.run; assert not {'torch', 'mlflow'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_flatten_and_differences():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [{"e": 1}]}) == {"a.b": 1, "a.c": {}, "d": [{"e": 1}]}
    assert differences({"a": {"b": 1}}, {"a": {"b": 1.0}}) == ["a.b: 1 -> 1.0"]
    assert differences(CONFIG, CONFIG) == []


@pytest.mark.parametrize(
    ("value", "hidden"),
    [
        ({"api_key": "x", "AWS_SECRET_ACCESS_KEY": "x", "apiKey": "x"}, dict.fromkeys(
            ("api_key", "AWS_SECRET_ACCESS_KEY", "apiKey"), "[redacted]")),
        ({"db": {"password": 1234}}, {"db": {"password": "[redacted]"}}),
        ({"token": ["x", "y"]}, {"token": "[redacted]"}),
        ("http://me:p%40ss@host:5000/a", "http://[redacted]@host:5000/a"),
        ("https://ghp_abc@host/x and s3://bucket/run@100", "https://[redacted]@host/x and s3://bucket/run@100"),
        (["--token", "x", "run=/r"], ["--token", "[redacted]", "run=/r"]),
        ("tracking.password=x https://h/?X-Amz-Signature=y&part=1",
         "tracking.password=[redacted] https://h/?X-Amz-Signature=[redacted]&part=1"),
        ("s3://me:pw@b/token=v1/x?token=y&sig=z", "s3://[redacted]@b/token=v1/x?token=[redacted]&sig=[redacted]"),
        ({"url": "s3://b/my key=1?token=y"}, {"url": "s3://b/my key=1?token=[redacted]"}),
        ("9token=x http://h/a;token=y", "9token=[redacted] http://h/a;token=[redacted]"),
    ],
)  # fmt: skip
def test_redact_hides_secrets(value, hidden):
    assert redact(value) == hidden


@pytest.mark.parametrize("path", ["/data/token=v1/set", "/a/key=2/password=x", "/x/my secret=1/set", "s3://b/key=a/b"])
def test_paths_are_no_secrets(tmp_path, path):
    """As partitions of a table are named; a run is opened again with the path that it keeps."""
    config = {"data": {"url": [path, "b"], "cache_dir": path}, "run": path, "sampling": {"vae": path}}
    assert redact(config) == config
    assert redact(f"there is no dataset at {path}") == f"there is no dataset at {path}" or " secret" in path
    make(tmp_path / "run", config={"data": {"url": path}})
    assert Run.open(str(tmp_path / "run")).config == {"data": {"url": path}}


def test_a_run_keeps_absolute_paths_and_compares_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    urls = ["data/mine", "/abs", "s3://b/x", "preset:imagenet256", ""]
    config = {
        "run": "runs/a", "init_from": "../w.bin", "tracking": {"uri": "sqlite:///x/m.db?a=b", "experiment": "runs/x"},
        "data": {"url": urls, "cache_dir": "~/c", "views": "mixed"}, "validation": {"url": ""},
        "slurm": {"folder": "jobs", "template": "t.in", "account": "a/b"},
    }  # fmt: skip
    kept = absolute_paths(config)
    made = make(tmp_path / "runs/a", config=kept)
    assert made.config == kept == {
        "run": f"{tmp_path}/runs/a", "init_from": f"{tmp_path.parent}/w.bin",
        "tracking": {"uri": f"sqlite:///{tmp_path}/x/m.db?a=b", "experiment": "runs/x"},
        "data": {"url": [f"{tmp_path}/data/mine", *urls[1:]], "cache_dir": "/home/me/c", "views": "mixed"},
        "validation": {"url": ""},
        "slurm": {"folder": f"{tmp_path}/jobs", "template": f"{tmp_path}/t.in", "account": "a/b"},
    }  # fmt: skip
    assert made.recipe == RECIPE
    monkeypatch.chdir("/")
    assert make(tmp_path / "runs/a", config=absolute_paths(config)) == made  # other paths from elsewhere


def test_redact_leaves_settings_alone():
    config = {"max_tokens": "auto", "tokens": 4096, "qk_norm": "layernorm", "keyed": True, "key": 3, "token": None}
    command = ["fitv2", "train", "model.qk_norm=none", "data.tokens=4096", "--keep", "3"]
    assert redact(config) == config
    assert redact(command) == command
