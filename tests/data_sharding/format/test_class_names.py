"""A label means one class, whatever dataset it comes from."""

import pytest

from data_sharding.errors import UserError
from data_sharding.format.class_names import check_same_classes, class_digest


def test_equal_lists_are_accepted():
    check_same_classes("A", ("ant", "bee"), "B", ("ant", "bee"))


@pytest.mark.parametrize(
    "others,said",
    [
        (("bee", "ant"), "label 0 is 'ant' in A and 'bee' in B"),
        (("ant", "cow"), "label 1 is 'bee' in A and 'cow' in B"),
        (("ant",), "A has 2 classes and B has 1"),
        (("ant", "bee", "cow"), "A has 2 classes and B has 3"),
    ],
)
def test_a_difference_is_named(others, said):
    with pytest.raises(UserError, match=f"{said}, but a label must mean one class"):
        check_same_classes("A", ("ant", "bee"), "B", others)


def test_the_digest_depends_on_names_and_order():
    # sha256 of ["ant","bee"], by sha256sum
    assert class_digest(["ant", "bee"]) == "a3e86c1b634bd6efb8c91e02975ea5e59abd275befb65edd2207686f6ec873b2"
    assert len({class_digest(names) for names in (["ant", "bee"], ["bee", "ant"], ["ant"], ["ant,bee"])}) == 4
