"""The mutation run by itself, in its smallest form: what it changes, and what it makes of the tests' answer."""

import subprocess
from pathlib import Path

import pytest

from tests.mutation import runner
from tests.mutation.operators import is_python, mutants_of
from tests.mutation.report import to_text
from tests.mutation.rooms import ROOMS, files_of, suite_of
from tests.support.repository import ROOT

SOURCE = '''"""A docstring with 1 + 1."""

def area(width: "1 + 1", height=2, *, log=None) -> int:
    """Another."""
    if width < 0 and not height:
        raise ValueError(f"{width - 1}")
    log.info("wide", 3)
    total = grown(height, width, by=3)
    total += 1
    return total * height
'''


def changes() -> set[tuple[int, str, str]]:
    return {(m.line, m.old, m.new) for m in mutants_of("area.py", SOURCE) if is_python(m, SOURCE)}


def test_what_is_executed_is_changed_and_what_is_said_is_not():
    """Written down by hand; each is one change, and leaves Python."""
    assert changes() == {
        (3, "2", "3"),
        (3, "2", "(1)"),
        (5, "<", "<="),
        (5, "and", "or"),
        (5, "not height", "height"),
        (5, "0", "1"),
        (5, "0", "(-1)"),
        (5, "width < 0 and not height", "(not (width < 0 and not height))"),
        (6, 'raise ValueError(f"{width - 1}")', "pass"),
        (8, "height, width", "width, height"),
        (8, ", by=3", ""),
        (8, "3", "4"),
        (8, "3", "(2)"),
        (9, "total += 1", "pass"),
        (9, "1", "2"),
        (9, "1", "(0)"),
        (10, "*", "/"),
        (10, "total * height", "None"),
    }


@pytest.fixture
def tree(tmp_path) -> Path:
    """A repository with a module of two functions, of which the tests look at one."""
    (tmp_path / "thing.py").write_text("def seen():\n    return 1\n\n\ndef unseen():\n    return 1\n")
    (tmp_path / "test_thing.py").write_text("import thing\n\n\ndef test_seen():\n    assert thing.seen() == 1\n")
    (tmp_path / "ignored.txt").touch()
    (tmp_path / ".gitignore").write_text("ignored.txt\n__pycache__/\n")
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    return tmp_path


def test_a_mutant_is_killed_or_survives_in_a_copy(tree, monkeypatch):
    source = (tree / "thing.py").read_text()
    at_the_end = source.rindex("1")
    with runner.copied_tree(tree) as copy:
        assert sorted(file.name for file in copy.iterdir()) == [".gitignore", "test_thing.py", "thing.py"]
        monkeypatch.setattr(runner, "_OPTIONS", ("-x", "-q", "-p", "no:cacheprovider"))

        def outcome(changed: str, *tests: str) -> runner.Outcome:
            return runner.run_changed(copy, "thing.py", changed, list(tests or ["test_thing.py"]))

        killed = outcome(source.replace("1", "2", 1))
        assert (killed.status, killed.by) == ("killed", "test_thing.py::test_seen")
        assert outcome(source[:at_the_end] + "2" + source[at_the_end + 1 :]).status == "survived"
        assert outcome("syntax error").status == "killed"
        assert outcome(source, "test_missing.py").status == "broken"
        assert (copy / "thing.py").read_text() == source
        (copy / "thing.py").write_text(source.replace("return 1", "while True: pass", 1))
        busy = runner.run_tests(copy, ["test_thing.py"], cpu_seconds=0.5)
        assert (busy.status, busy.all_ran) == ("survived", False)  # no test had failed by then
        monkeypatch.setattr(runner, "TEST_SECONDS", 0.3)
        spins = runner.run_tests(copy, ["test_thing.py"])
        assert (spins.status, spins.by) == ("killed", "test_thing.py::test_seen")
    assert not copy.exists() and (tree / "thing.py").read_text() == source


def test_every_source_file_is_in_one_room_and_has_tests_of_its_own_first():
    found = [file for room in ROOMS for file in files_of(ROOT, room)]
    packages = ("data_sharding", "fitv2_scale", "launchers")
    everything = [str(f.relative_to(ROOT)) for package in packages for f in (ROOT / package).rglob("*.py")]
    assert sorted(found) == sorted(everything)
    first, *others = suite_of(ROOT, "data_sharding/plan", "data_sharding/plan/balance.py")
    assert first == "tests/data_sharding/plan/test_balance.py" and "tests/data_sharding/plan/test_plan.py" in others
    assert all((ROOT / test).exists() for room in ROOMS for test in suite_of(ROOT, room, files_of(ROOT, room)[0]))


def test_the_report_counts_by_room_and_names_what_survived():
    one = {"what": "a -> b", "cpu_seconds": 61.2, "all_ran": False}
    results = [
        {"room": "run", "name": "x.py:1", "status": "killed"} | one,
        {"room": "run", "name": "x.py:2", "status": "survived"} | one,
        {"room": "cli", "name": "y.py:3", "status": "hangs"} | one,
    ]
    lines = to_text(results).splitlines()
    assert lines[2:5] == ["| cli | 1 | 1 (100%) | 0 |", "| run | 2 | 1 (50%) | 1 |", "| all | 3 | 2 (67%) | 1 |"]
    assert lines[6:] == ["survived (after 61 s of tests): x.py:2  a -> b"]
