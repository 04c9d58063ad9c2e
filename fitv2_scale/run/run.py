"""A RUN: a folder with the run's identity, the log that decides what counts, and one folder per attempt.

    run.json              identity of the run; written once (see ``Run``)
    classes.json          the digest of its class list, if run.json was written without one (see ``class_list``)
    log/00000001 …        who trains and what is committed (see ``log``)
    attempts/<n>/         start.json, end.json (see ``Attempt``), journal/ (see ``tracking.journal``)
    ledger/00000001.json  images that cannot be read, and their substitutes (see ``substitutions``)
    tracking/             the uploader's state (see ``tracking.publisher``)
    chain/00000001 …      jobs on a cluster (see ``launchers.chain_log``)

The config has two halves. The *recipe* decides what is learned; it is hashed, and a run keeps it for life. The
*runtime* half (layout, logging, storage) may differ from attempt to attempt.
"""

import json
import logging
import re
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_sharding.errors import DataError, UserError
from data_sharding.storage.open_store import open_store
from data_sharding.storage.store import Store
from fitv2_scale.run import class_list, local_files
from fitv2_scale.run.class_list import DataIdentity
from fitv2_scale.run.create import IDENTITY, create_identity, refuse_foreign_folder
from fitv2_scale.run.differences import differences, recipe_hash, start_differences
from fitv2_scale.run.log import LogEntry, RunLog, newest_attempt, now
from fitv2_scale.run.redact import redact
from fitv2_scale.run.reference import refuse_name
from fitv2_scale.run.shapes import End, Identity, Pace, Start

# How an attempt ends: exit codes of `fitv2 train`, and codes in end.json. README.md says how launchers react to each.
DONE, RETRY, GIVE_UP, BAD_INPUT, BUG = 0, 75, 93, 2, 1
NOT_FINITE = "loss or gradient was not finite"  # how the reason begins if this is the cause of a GIVE_UP

# Versions up to a2e80d5 wrote these keys of run.json under other names. Such runs continue, so both are read.
_FORMER_KEYS = {"science": "recipe", "science_hash": "recipe_hash"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One training run. A sample of run.json:

    {"id": "demo-5f1c09ab", "created": "2025-06-01T12:00:00.000000+00:00", "config": {…}, "recipe": {…},
     "recipe_hash": "0c9d…", "plan_hash": "77e1…", "parent": {"run": "/runs/first", "step": 1000} or null,
     "classes": "41be…"}

    ``config`` (as resolved when the run was made, see ``paths`` for its paths) and ``recipe`` hold no secrets;
    ``recipe_hash`` is the sha256 of the latter as canonical JSON; ``plan_hash`` identifies the data and its order (null
    for imported weights: their commits have it); ``parent`` is the commit that a fork started from; ``classes`` is the
    digest of the class list, which says what a label means (see ``class_list``; None where it is not known).
    """

    id: str
    created: str  # ISO 8601, UTC
    config: dict[str, Any]
    recipe: dict[str, Any]
    recipe_hash: str
    plan_hash: str | None
    parent: dict[str, Any] | None
    store: Store = field(compare=False, repr=False)
    log: RunLog = field(compare=False, repr=False)
    classes: str | None = None

    @staticmethod
    def open_or_create(
        url: str,
        config: dict[str, Any],
        recipe: dict[str, Any],
        plan_hash: str | None,
        parent: dict[str, Any] | None = None,
        *,
        data: DataIdentity | None = None,
        complete: Callable[[dict[str, Any]], dict[str, Any]] = dict,
        weights: Callable[[], str | None] = lambda: None,
    ) -> "Run":
        """Makes the run at ``url``, or continues the one that is there.

        ``complete(recipe)`` gives a recipe of any version all keys of this one, and raises UserError if it has others.
        A continuation may leave ``parent`` out, and give the weights it began with by another path: ``weights()`` is
        their digest.

        Raises:
            UserError: that one has another recipe, other data, other classes or another parent; shows each difference.
                Or a new run's name ends with @STEP, or its local folder holds something else.
            DataError: its recipe was edited.
        """
        store = open_store(url)
        recipe = redact(recipe)  # before it is hashed: a changed password does not change the recipe
        new = {
            "id": f"{re.sub(r'[^A-Za-z0-9_.-]', '_', Path(store.url).name)}-{secrets.token_hex(4)}",
            "created": now(),
            "config": redact(config),
            "recipe": recipe,
            "recipe_hash": recipe_hash(recipe),
            "plan_hash": plan_hash,
            "parent": redact(parent),
        } | ({"classes": data.classes} if data else {})
        if not store.exists(IDENTITY):
            refuse_name(store)
            refuse_foreign_folder(store)
            with suppress(FileExistsError):  # another process was first: its identity is checked below
                create_identity(store, new)
        run = Run.open(url)
        run.require_same(new, complete, weights)
        if data is None or (run.plan_hash is None and not class_list.were_trained_on(store, run.log, data)):
            return run
        return replace(run, classes=class_list.agreed(store, run.classes, data.classes))

    def require_same(
        self,
        new: dict[str, Any],
        complete: Callable[[dict[str, Any]], dict[str, Any]],
        weights: Callable[[], str | None],
    ) -> None:
        """Returns if recipe, plan_hash and parent of ``new``, what run.json would hold, are those of this run; the
        last two are not compared if they are None there. Raises as ``open_or_create``, whose arguments these are."""
        if changes := self._differences_from(new, complete, weights):
            raise UserError(
                f"{self.url} holds a different run ({'; '.join(changes)}); "
                "give a new run folder, or fork it with --fork-from RUN@STEP."
            )

    def _differences_from(
        self,
        new: dict[str, Any],
        complete: Callable[[dict[str, Any]], dict[str, Any]],
        weights: Callable[[], str | None],
    ) -> list[str]:
        if recipe_hash(self.recipe) != self.recipe_hash:
            raise DataError(f"{self.store.path(IDENTITY)} was edited: its recipe does not match its hash; restore it.")
        try:
            stored, wanted = complete(self.recipe), complete(json.loads(json.dumps(new["recipe"])))
        except UserError as error:
            raise UserError(f"{self.url}: {error}") from error
        paths = [recipe.get("init_from") for recipe in (stored, wanted)]
        known = self.recorded("init_from") if all(paths) and paths[0] != paths[1] else None
        if known is not None and known == weights():  # a path says where they lie, not which they are
            stored["init_from"] = paths[1]
        changes = differences(stored, wanted)
        if None not in (self.plan_hash, new["plan_hash"]) and self.plan_hash != new["plan_hash"]:
            plans = f"{self.plan_hash:.16} -> {new['plan_hash']:.16}"
            changes.append(f"plan_hash: {plans} (other data, seed or views, or another planner)")
        # The run's id and the step: where the parent's folder lies may change.
        own, wanted_parent = ((p["run"], p["step"]) if p else None for p in (self.parent, new["parent"]))
        if wanted_parent not in (None, own):
            changes.append(f"parent: {json.dumps(self.parent)} -> {json.dumps(new['parent'])}")
        return changes

    @staticmethod
    def open(url: str) -> "Run":
        """The run at ``url``. Raises UserError if there is none."""
        store = open_store(url)
        record = store.read_json(IDENTITY)
        if record is None:
            raise UserError(f"{store.url} is not a run (it has no {IDENTITY}); check the path.")
        try:
            identity = {_FORMER_KEYS.get(key, key): value for key, value in record.items()}
            run = Run(**Identity.check(identity), store=store, log=RunLog(store))
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{store.path(IDENTITY)} is not what this version writes ({error}).") from error
        return run if run.classes else replace(run, classes=class_list.adopted(store))

    @property
    def url(self) -> str:
        return self.store.url

    def local_path(self, rel: str) -> Path:
        """Where the file ``rel`` grows: in the run if that is local, else on this node (see ``local_files``)."""
        return local_files.local_path(self.store, self.id, rel)

    def upload(self, rel: str) -> None:
        """Copies the file ``rel``, or all files below it, from this node to a run that is not local."""
        local_files.upload(self.store, self.id, rel)

    def download(self, rel: str) -> Path:
        """The object ``rel`` as a file on this node. Raises FileNotFoundError."""
        return local_files.download(self.store, self.id, rel)

    def recorded(self, fact: str) -> Any:
        """What the newest attempt that recorded ``fact`` in its start.json has there; None if none did."""
        for number in range(newest_attempt(self.log.entries()), 0, -1):
            start = Attempt(number, self).read_start()
            if fact in start:
                return start[fact]
        return None

    def claim(self, provenance: dict[str, Any]) -> "Attempt":
        """Starts an attempt, which makes every older one stale. Writes its start.json, and code.diff if the code has
        changes that are not in git. Raises DataError if the log has lost entries."""
        self._require_whole_log()
        entry = self.log.claim()
        attempt = Attempt(entry.attempt, self)
        before = Attempt(entry.attempt - 1, self).read_start()
        start: dict[str, Any] = {"attempt": entry.attempt, "time": entry.time, **redact(provenance)}
        start["changed"] = start_differences(before, start)
        if diff := start.pop("diff", None):
            self.store.put(f"{attempt.path}/code.diff", diff.encode())
        self.store.put_json(f"{attempt.path}/start.json", start, indent=1)
        return attempt

    def _require_whole_log(self) -> None:
        self.log.require_whole()
        following = newest_attempt(self.log.entries()) + 1
        if self.store.exists(f"attempts/{following}/start.json") and newest_attempt(self.log.entries()) < following:
            raise DataError(
                f"{self.store.path('log')} has lost its end: attempt {following} was here and is not in it; restore "
                "the folder from a backup, or begin a new run folder with --fork-from."
            )


@dataclass(frozen=True)
class Attempt:
    """Training by one set of processes, from their start to their end. Samples of its files in attempts/<number>/:

    start.json  {"attempt": 2, "time": "2025-06-01T12:00:00.000000+00:00", "nonce": "9f…", "changed": [], …}
    end.json    {"attempt": 2, "time": "2025-06-01T13:00:00.000000+00:00", "code": 75, "reason": "SIGUSR1"}
    """

    number: int
    run: Run = field(repr=False)

    @property
    def changed(self) -> list[str]:
        """Differences of packages, code, machine and validation to the attempt before: ["python: 3.11.4 -> 3.12.0"]."""
        return self.read_start().get("changed", [])

    def read_start(self) -> dict[str, Any]:
        """start.json; empty if there is none."""
        return self.run.store.read_json(f"{self.path}/start.json", Start) or {}

    @property
    def claimed_by(self) -> tuple[str, int]:
        """Host name and process id of its rank 0."""
        start = self.read_start()
        return start.get("hostname", ""), start.get("pid", 0)

    @property
    def path(self) -> str:
        """Its folder, relative to the run."""
        return f"attempts/{self.number}"

    @property
    def folder(self) -> Path:
        """Its folder on local disk, for journals and logs."""
        return self.run.local_path(self.path)

    def upload(self, file: Path) -> None:
        """Copies a file of ``folder`` to a run that is not local."""
        self.run.upload(f"{self.path}/{file.relative_to(self.folder)}")

    def commit(self, step: int, path: str, manifest_digest: str) -> LogEntry:
        """Makes the checkpoint count. Call after its files, its manifest and ``Journal.seal``.

        Raises StaleAttempt, with nothing written, if a newer attempt has claimed the run.
        """
        return self.run.log.commit(self.number, step, path, manifest_digest)

    def retire(self, entry: int) -> LogEntry:
        """Withdraws the COMMIT with log number ``entry``, so that its data may go. Raises as ``commit`` does."""
        return self.run.log.retire(self.number, entry)

    def record_pace(self, step_seconds: float, save_seconds: float) -> None:
        """Records the longest step and save. Launchers ask for a save so long before a time limit."""
        pace = {"step_seconds": round(step_seconds, 3), "save_seconds": round(save_seconds, 3)}
        try:
            self.run.store.put_json(f"{self.path}/pace.json", pace, indent=1)
        except (OSError, UserError) as error:
            log.warning("attempt %d could not record its step and save times: %s", self.number, error)

    def read_pace(self) -> dict[str, float] | None:
        """{"step_seconds": 1.5, "save_seconds": 40.0}, or None if it has not saved yet."""
        return self.run.store.read_json(f"{self.path}/pace.json", Pace)

    def end(self, code: int, reason: str, lost: Sequence[int] = (), stands_in: bool = False) -> None:
        """Records why the attempt ended. ``code`` is the exit code of `train`: 0, 2, 75, 93, or another for a bug.
        ``lost``: ranks that ended without a word. Who ``stands_in`` for rank 0, if it is one, leaves what it recorded.
        If the storage cannot be written, the code stays the same; launchers take a missing record for 75.
        """
        end = {"attempt": self.number, "time": now(), "code": code, "reason": redact(reason)}
        write = self.run.store.create_json if stands_in else self.run.store.put_json
        try:
            write(f"{self.path}/end.json", end | ({"lost": list(lost)} if lost else {}), indent=1)
        except (OSError, UserError) as error:
            if not (stands_in and isinstance(error, FileExistsError)):
                log.warning("attempt %d ends with %d (%s), not recorded: %s", self.number, code, reason, error)

    def read_end(self) -> dict[str, Any] | None:
        """end.json, or None if the attempt was killed or still runs."""
        return self.run.store.read_json(f"{self.path}/end.json", End)
