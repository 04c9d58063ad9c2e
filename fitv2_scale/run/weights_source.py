"""Weights that people name: a run's commit or a file. They are known by the digest of their content, not by where they
lie."""

from dataclasses import dataclass
from pathlib import Path

from data_sharding.errors import UserError
from data_sharding.storage.file_digest import file_digest
from data_sharding.storage.files import with_local
from fitv2_scale.run.log import LogEntry
from fitv2_scale.run.reference import is_run, parse_reference
from fitv2_scale.run.run import Run

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True)
class WeightsSource:
    """RUN@STEP, or a weights file (then ``step`` is None)."""

    url: str
    step: int | None

    @classmethod
    def parse(cls, text: str) -> "WeightsSource":
        """Raises UserError unless it is one of both; whether the commit or file exists is not looked at."""
        if is_weights(text):
            return cls(text, None)
        wanted = f"RUN@STEP, as in runs/first@1000, or a weights file ({', '.join(SUFFIXES)})"
        return cls(*parse_reference(text, "init_from", wanted))

    def digest(self) -> str:
        """The digest of the weights, wherever they lie: of a commit that of its manifest, which holds all others; of a
        file that of its content, which takes as long as reading it.

        Raises:
            UserError: there are no such weights.
        """
        if self.step is not None:
            return self.commit().fields["manifest"]
        try:
            return with_local(self.url, lambda: file_digest(self.url))
        except FileNotFoundError:
            raise UserError(f"there is no weights file {self.url}") from None

    def commit(self) -> LogEntry:
        """The commit of RUN@STEP. Raises UserError if there is none."""
        commits = Run.open(self.url).log.commits()
        if found := [entry for entry in commits if entry.fields["step"] == self.step]:
            return found[-1]
        steps = [entry.fields["step"] for entry in commits]
        raise UserError(f"{self.url} has no commit at step {self.step}, but at {steps or 'none'}: choose one of them")


def is_weights(text: str) -> bool:
    """Whether it names a file of weights. Folders may be called as they like: a run, or photographs."""
    return text.endswith(SUFFIXES) and not Path(text).is_dir() and not is_run(text)
