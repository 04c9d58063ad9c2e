"""What an object store is asked for, without a server."""

import pytest

from data_sharding.storage.s3_store import S3Store


@pytest.fixture
def store(monkeypatch):
    """A run's store with four objects; ``asked`` are the requests that change something."""
    made = object.__new__(S3Store)
    made.url, made.asked = "s3://bucket/run", []
    keys = ["steps/1/a", "steps/1/b/c", "steps/10/a", "log/1"]

    def request(name, *args, **options):
        if name == "find":
            folder = args[0]
            return [f"bucket/run/{key}" for key in keys if key.startswith(f"{folder}/")]
        made.asked.append((name, *args))

    monkeypatch.setattr(made, "_request", request, raising=False)
    return made


def test_a_tree_is_deleted_and_no_other(store):
    assert store.list("steps/1/") == ["steps/1/a", "steps/1/b/c"]
    store.delete_tree("steps/1")
    assert store.asked == [("rm_file", "steps/1/a"), ("rm_file", "steps/1/b/c")]
    with pytest.raises(ValueError, match="refusing to delete all"):
        store.delete_tree(".")
