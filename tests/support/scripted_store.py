"""A store in memory whose next creates do what a test says."""

from collections.abc import Callable, Sequence

from data_sharding.storage.local_store import LocalStore


class ScriptedStore(LocalStore):
    """``script`` says what the next creates do; when it is used up, they succeed:

    "ok", "lost" (done, but an error comes back), "resent" (done, but "exists" comes back), "failed" (not done), or
    "raced" (``rival`` runs first). A listing fails.
    """

    def __init__(self, script: Sequence[str] = (), rival: Callable[[], object] = lambda: None) -> None:
        super().__init__("/nowhere")
        self.objects: dict[str, bytes] = {}
        self.script = list(script)
        self.rival = rival

    def read(self, path: str) -> bytes:
        if path not in self.objects:
            raise FileNotFoundError(path)
        return self.objects[path]

    def create(self, path: str, data: bytes) -> None:
        act = self.script.pop(0) if self.script else "ok"
        if act == "raced":
            self.rival()
        if act == "failed":
            raise TimeoutError("request not sent")
        if path in self.objects:
            raise FileExistsError(path)
        self.objects[path] = data
        if act == "lost":
            raise TimeoutError("reply lost")
        if act == "resent":
            raise FileExistsError(path)

    def list(self, prefix: str) -> list[str]:
        raise AssertionError("a listing may lag; a log must not ask for one")
