"""The errors whose messages are written for the user."""


class UserError(Exception):
    """An input is wrong. The message is one sentence that names the problem and the fix; the CLI exits with 2."""

    origin = ""  # the rank that met it and prints it, as in "rank 1 on n17", if that was not this process

    def said_by(self, rank: int, for_node: bool = False) -> str | None:
        """What ``rank`` prints. A sentence appears where it arose, and the first rank repeats what another one met. One
        that speaks ``for_node`` says only where to look: each node may have a terminal or a log of its own, and a line
        a rank would be too many in one that they share. Others: None."""
        if not self.origin:
            return str(self)
        if rank == 0:
            return f"{self.origin}: {self}"
        return f"{self.origin} says why this ends" if for_node else None

    def and_saved_at(self, step: int) -> "UserError":
        """Itself, which ends a run of ``step`` steps: they are saved, and the sentence says so."""
        if step:
            self.args = (f"{self}; the run is saved at step {step}",)
        return self


class DataError(UserError):
    """Stored data is missing or does not match its digest. The message names the file and the frame."""


class StorageDown(UserError):
    """The storage does not answer; neither the data nor the user is at fault. The message has the last error."""


class BadPlace(StorageDown):
    """Perhaps one place of a disk is bad and all others can be read (see ``storage.bad_places``)."""


class RanksMissing(UserError):
    """Ranks of a command have not joined, hang or have ended. The message names them; the CLI exits with 75."""
