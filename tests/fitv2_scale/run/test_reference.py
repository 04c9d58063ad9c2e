"""RUN@STEP, whatever the run is called."""

import pytest

from data_sharding.errors import UserError
from fitv2_scale.run.reference import parse_reference, split_reference


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
