"""profile.steps writes a trace and a picture of the memory into the run, and changes nothing else."""

import gzip
import io
import json
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from data_sharding.errors import UserError
from fitv2_scale.cli.__main__ import main
from fitv2_scale.config.load import load_config
from fitv2_scale.train.loop import DONE, train
from tests.support.commits import commit_bytes
from tests.support.ranks import run_ranks

BASE = {"model": {"depth": 2, "hidden": 32, "heads": 2}, "data": {"url": "set"}, "train": {"steps": 1}}


def written(config, attempt: int) -> dict[str, Path]:
    return {path.name: path for path in sorted(Path(config.run, f"attempts/{attempt}/profile").glob("*"))}


def test_a_trace_and_the_memory_of_the_steps_asked_for(tiny):
    plain, profiled = tiny("plain"), tiny("profiled", profile__steps="2:4")
    assert run_ranks(2, train, plain) == run_ranks(2, train, profiled) == [DONE] * 2
    assert commit_bytes(profiled.run) == commit_bytes(plain.run)
    assert written(plain, 1) == {}
    files = written(profiled, 1)  # of the first rank alone
    assert list(files) == ["00000002-00000004.memory.txt", "00000002-00000004.trace.json.gz"]
    events = json.loads(gzip.decompress(files["00000002-00000004.trace.json.gz"].read_bytes()))["traceEvents"]
    names = {event.get("name") for event in events}
    assert {name for name in names if str(name).startswith("step ")} == {"step 3", "step 4"}
    assert {"aten::addmm", "aten::_fused_adamw_", "[memory]"} <= names
    assert "aten::addmm" in files["00000002-00000004.memory.txt"].read_text()


def test_an_attempt_profiles_what_it_takes_of_them(tiny):
    """The first attempt ends at step 3, the second takes the rest, the third comes too late and says so."""
    said = []
    for steps in (3, 5, 6):
        config = tiny(train__steps=steps, profile__steps="2:5")
        said += run_ranks(1, train_and_listen, config)
    late = "profile.steps=2:5: nothing is profiled, this attempt takes the steps after 5 up to 6"
    assert [late in text for text in said] == [False, False, True]
    traces = [[name for name in written(tiny(), n) if name.endswith(".gz")] for n in (1, 2, 3)]
    assert traces == [["00000002-00000003.trace.json.gz"], ["00000003-00000005.trace.json.gz"], []]


def train_and_listen(config) -> str:
    with redirect_stderr(io.StringIO()) as said:
        assert train(config) == DONE
    return said.getvalue()


def test_the_program_says_so_and_exits_with_2(tmp_path, capfd):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(BASE))
    assert main(["train", str(path), "profile.steps=9:3"]) == 2
    assert "profile.steps = '9:3': give a:b with a < b" in capfd.readouterr().err


@pytest.mark.parametrize("text", ["5", "9:3", "3:3", "a:b", "1:2:3", ":4", "-1:4", "1.5", "[1, 2]"])
def test_what_is_no_range_is_refused_in_a_sentence(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(BASE))
    with pytest.raises(UserError, match="profile.steps = .*: give a:b with a < b, as in 100:103"):
        load_config(str(path), [f"profile.steps={text}"])


@pytest.mark.parametrize("text", ["5:9", "100:103", "0:1", "7:700"])
def test_a_range_is_not_a_number_of_base_60(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(BASE))
    first, last = map(int, text.split(":"))
    assert load_config(str(path), [f"profile.steps={text}"]).profile.range == range(first, last)
    path.write_text(f"{json.dumps(BASE)[:-1]}, profile: {{steps: {text}}}}}")
    assert load_config(str(path)).profile.steps == text
