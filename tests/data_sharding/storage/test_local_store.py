"""What a local store has written is there after a power cut, with all folders above it."""

import pytest

from data_sharding.storage.local_store import LocalStore
from data_sharding.storage.store import Store
from tests.support.power_cut import PowerCut


def write(store: Store, path: str) -> None:
    with store.writing(path, 4) as file:
        file.write(b"data")


@pytest.mark.parametrize(
    "act",
    [
        lambda store, path: store.put(path, b"data"),
        lambda store, path: store.create(path, b"data"),
        write,
    ],
    ids=["put", "create", "writing"],
)
def test_an_object_in_new_folders_outlives_a_power_cut(act, tmp_path, monkeypatch):
    power = PowerCut(tmp_path, monkeypatch)
    act(LocalStore(str(tmp_path / "run")), "steps/3/a")
    left = power.left()
    assert left.pop("run/steps/3/a") == 4
    assert all(name.endswith(".tmp") for name in left)  # removed, but not for certain
