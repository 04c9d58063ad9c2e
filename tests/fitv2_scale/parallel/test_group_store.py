"""Waiting for a word in the store of the process group. What ranks do with it is in test_roll_call."""

from fitv2_scale.parallel.group_store import appears


class Asked:
    """A store in which a key appears when it has been asked for ``until`` times."""

    def __init__(self, until: float):
        self.until, self.times = until, 0

    def check(self, keys: list[str]) -> bool:
        assert keys == ["word"]
        self.times += 1
        return self.times > self.until


def test_a_word_is_asked_for_less_and_less_often():
    """Else each of a thousand ranks that wait would keep the server busy. Pauses grow from 2 ms by half: twelve of them
    are longer than half a second."""
    store = Asked(float("inf"))
    assert not appears(store, "word", 0.5)
    assert 2 <= store.times <= 13


def test_a_word_that_is_there_is_found_at_once():
    store = Asked(0)
    assert appears(store, "word", 0.0) and store.times == 1
    store = Asked(3)
    assert appears(store, "word", 60.0) and store.times == 4
