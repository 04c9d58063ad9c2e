"""JSON that a stranger wrote: a value, or one sentence that names the file."""

import pytest

from data_sharding.errors import DataError
from data_sharding.storage.json_bytes import from_json, to_json


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e400"])
def test_numbers_that_nothing_can_be_computed_with_are_refused(number):
    for data in (number, b'{"a": [1, ' + number + b"]}"):
        with pytest.raises(DataError, match=r"run.json is damaged \(.* is not a finite number\); restore it"):
            from_json(data, "run.json")


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100_000, b"'a'"])
def test_what_is_no_json_is_refused(data):
    with pytest.raises(DataError, match=r"run.json is damaged \(.*restore it from a backup"):
        from_json(data, "run.json")


def test_other_numbers_are_what_they_were():
    value = {"a": [0.1, 1e308, -5e-324, 2**70, -0.0], "b": "NaN"}
    assert from_json(to_json(value), "run.json") == value
