"""RUN@STEP, whatever the run is called."""

import re
from pathlib import Path

import pytest

from data_sharding.errors import UserError
from fitv2_scale.run.reference import find_reference, parse_reference, split_reference


@pytest.mark.parametrize(
    "text,parts",
    [
        ("runs/first@1000", ("runs/first", 1000)),
        ("s3://bucket/a@b/run@0", ("s3://bucket/a@b/run", 0)),
        ("me@10@007", ("me@10", 7)),
        ("fitv2_3b2@2000000", ("fitv2_3b2", 2_000_000)),
        *(
            (text, (text, None))
            for text in ("runs/first", "", "@", "@5", "run@", "run@-1", "run@1.5", "run@²", "a@1/b")
        ),
    ],
)
def test_the_step_is_what_follows_the_last_at(text, parts):
    assert split_reference(text) == parts


def test_a_missing_step_is_named_with_the_option():
    assert parse_reference("runs/first@1000", "--fork-from") == ("runs/first", 1000)
    with pytest.raises(UserError, match=r"^--fork-from 'runs/first': give RUN@STEP, as in runs/first@1000$"):
        parse_reference("runs/first", "--fork-from")


def make(folder: Path) -> str:
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    return str(folder)


def test_a_run_whose_name_ends_like_a_step_is_that_run(tmp_path):
    odd = make(tmp_path / "exp@4")
    assert find_reference(odd) == (odd, None)
    assert find_reference(f"{odd}@10") == (odd, 10)
    with pytest.raises(UserError, match=r"--fork-from '.*exp@4': give RUN@STEP"):
        parse_reference(odd, "--fork-from")


def test_a_name_that_means_two_things_is_refused(tmp_path):
    odd, plain = make(tmp_path / "exp@4"), make(tmp_path / "exp")
    said = f"{odd} is a run, and also step 4 of the run {plain}: give {odd}/ for the one, {plain}/@4 for the other"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        find_reference(odd)
    assert find_reference(f"{odd}/") == (f"{odd}/", None)
    assert find_reference(f"{plain}/@4") == (f"{plain}/", 4)
    assert find_reference(f"{plain}@5") == (plain, 5)
