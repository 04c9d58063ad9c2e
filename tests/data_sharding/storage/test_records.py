"""The shape of what is read back."""

import pytest

from data_sharding.storage.records import Count, ListOf, Seconds, Shape, Time


class Save(Shape):
    step: Count
    seconds: Seconds = 0.0
    at: Time = "2026-11-30T12:00:00+00:00"


GOOD = {"step": 3, "seconds": 1.5, "at": "2026-11-30T12:00:00+01:00", "other": "kept"}


def test_a_record_of_the_shape_is_itself():
    assert Save.check(GOOD) is GOOD
    assert ListOf[Save].check([GOOD, {"step": 0}]) == [GOOD, {"step": 0}]


@pytest.mark.parametrize(
    "change,said",
    [
        ({"step": -1}, "step: input should be greater than or equal to 0"),
        ({"step": 1 << 63}, "step: input should be less than 9223372036854775808"),
        ({"step": "3"}, "step: input should be a valid integer"),
        ({"seconds": -0.1}, "seconds: input should be greater than or equal to 0"),
        ({"seconds": 1e12}, "seconds: input should be less than 1000000000000"),
        ({"at": "2026-11-30T12:00:00"}, "at: value error, it has no time zone"),
    ],
)
def test_another_is_one_sentence(change, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        Save.check(GOOD | change)
    with pytest.raises(ValueError, match=f"^1.{said}"):
        ListOf[Save].check([GOOD, GOOD | change])


def test_what_is_no_object_at_all():
    with pytest.raises(ValueError, match="^it: input should be a valid dict"):
        Save.check([])
