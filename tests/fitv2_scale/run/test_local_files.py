"""Files of a run on an object store grow on the node."""

from dataclasses import dataclass, field

import pytest

from fitv2_scale.run.local_files import download, local_path, upload


@dataclass
class Objects:
    """What these functions need of a store that is none on a disk."""

    objects: dict[str, bytes] = field(default_factory=dict)

    def put(self, path: str, data: bytes) -> None:
        self.objects[path] = data

    def read(self, path: str) -> bytes:
        if path not in self.objects:
            raise FileNotFoundError(path)
        return self.objects[path]


@pytest.fixture(autouse=True)
def node(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))


def test_files_go_to_the_store_and_come_back():
    store = Objects()
    for name in ("steps/1.jsonl", "steps/deep/2.jsonl"):
        file = local_path(store, "id", name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    upload(store, "id", "steps")
    upload(store, "id", "steps/1.jsonl")
    upload(store, "id", "nothing")
    assert store.objects == {"steps/1.jsonl": b"steps/1.jsonl", "steps/deep/2.jsonl": b"steps/deep/2.jsonl"}
    file = download(store, "another id", "steps/1.jsonl")
    assert file == local_path(store, "another id", "steps/1.jsonl") and file.read_bytes() == b"steps/1.jsonl"
    with pytest.raises(FileNotFoundError):
        download(store, "id", "nothing")
