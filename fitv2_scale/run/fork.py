"""The commit of another run that a new run starts from."""

from dataclasses import dataclass
from typing import Any

from data_sharding.errors import UserError
from data_sharding.storage.open_store import open_store
from fitv2_scale.run.reference import parse_reference
from fitv2_scale.run.run import Run


@dataclass(frozen=True)
class Fork:
    """--fork-from RUN@STEP."""

    run: Run
    step: int

    @classmethod
    def parse(cls, text: str, child: str) -> "Fork":
        """``child`` is the URL of the new run. Once that has commits, the parent's commit need not exist any more.

        Raises UserError.
        """
        url, step = parse_reference(text, "--fork-from")
        run = Run.open(url)
        steps = [entry.fields["step"] for entry in run.log.commits()]
        child_has_commits = open_store(child).exists("run.json") and Run.open(child).log.commits()
        if step not in steps and not child_has_commits:
            raise UserError(f"--fork-from {text}: {url} has commits at {steps or 'no step'}, choose one of them")
        return cls(run, step)

    def parent(self) -> dict[str, Any]:
        """For the new run's run.json."""
        return {"run": self.run.id, "url": self.run.url, "step": self.step}
