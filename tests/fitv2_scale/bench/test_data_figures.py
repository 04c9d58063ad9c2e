"""Which parts of `fitv2 bench data` are measured."""

import pytest

from data_sharding.errors import UserError
from fitv2_scale.bench.data_figures import measure, to_text


def test_a_part_that_is_not_known_is_refused():
    with pytest.raises(UserError, match="there is no part nosuch: choose from .*"):
        measure(["nosuch"])


def test_nothing_asked_is_nothing_measured():
    assert measure([]) == {} and to_text({}) == ""
