"""A log of JSON objects in a store: ``<prefix>/00000001``, ``00000002``, …, each created once and never changed.

Several processes may append at the same time, and a reply of the storage may be lost. So each entry carries a nonce
under the key "nonce", drawn by whoever appends it: what stands under a number after a failed create says whose it is.
"""

import re
import secrets
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from data_sharding.errors import DataError, UserError
from data_sharding.storage.json_bytes import parse_json, to_json
from data_sharding.storage.store import Store

Entry = TypeVar("Entry")


class NumberedLog(Generic[Entry]):
    """Reads and extends one log. Safe to share between threads.

    The store is never asked for a listing, which may lag: the end is found by reading forward to the first missing
    number. Entries never change, so each is read once.
    """

    def __init__(
        self,
        store: Store,
        prefix: str,
        parse: Callable[[int, dict[str, Any]], Entry],
        *,
        suffix: str = "",
        noun: str,
        remedy: str,
    ) -> None:
        """``parse(number, record)`` makes an entry of a JSON object, or raises ValueError, KeyError or TypeError if it
        is none of this log. An error message reads "log/00000007 is not a ``noun`` (…): ``remedy``"."""
        self._store, self._prefix, self._suffix, self._parse = store, prefix, suffix, parse
        self._noun, self._remedy = noun, remedy
        self._seen: list[Entry] = []
        self._lock = threading.Lock()

    def entries(self) -> list[Entry]:
        """All entries as of now, oldest first. Raises DataError if one is damaged."""
        with self._lock:
            while (found := self._read(len(self._seen) + 1)) is not None:
                self._seen.append(found[0])
            return list(self._seen)

    def require_whole(self) -> None:
        """Raises DataError if an entry is missing before others: it was deleted, and all behind it would count as never
        written, until an append runs into them."""
        written = [int(n) for path in self._store.list(f"{self._prefix}/") if (n := self._number(path))]
        end = len(self.entries())  # after the listing, which may lag but shows nothing that was not written
        if max(written, default=0) > end:
            raise DataError(
                f"{self._store.path(self._path(end + 1))} is missing, though there are entries up to {max(written)}: "
                f"{self._remedy}"
            )

    def _number(self, path: str) -> str | None:
        """The number in the path of an entry; None for other files."""
        name = re.fullmatch(r"(\d{8,})" + re.escape(self._suffix), path.removeprefix(f"{self._prefix}/"), re.ASCII)
        return name[1] if name else None

    def append(self, build: Callable[[Sequence[Entry], str], dict[str, Any] | None]) -> list[Entry]:
        """Appends the object that ``build(entries before it, nonce)`` returns, with the nonce in it; None: nothing.

        If somebody else takes the number first, ``build`` is called again with what they wrote. What it raises is
        passed on, with nothing written.

        Returns all entries up to the new one, or those before it if there is none. Raises DataError as ``entries``;
        ValueError or KeyError if ``build`` returned what could not be read again, which is then not written;
        OSError and UserError (StorageDown among them) if the entry was not written.
        """
        nonce = secrets.token_hex(8)
        while True:
            before = self.entries()
            record = build(before, nonce)
            if record is None:
                return before
            assert record["nonce"] == nonce, "an entry must carry its nonce"
            number, data = len(before) + 1, to_json(record)
            entry = self._parse(number, parse_json(data))  # first: what nobody can read would stay there for ever
            try:
                self._store.create(self._path(number), data)
            except (OSError, UserError) as error:
                # "Exists" may be our own entry, sent again below us because its reply was lost; any other error may
                # hide a success. Only what stands there now decides.
                if (found := self._read(number)) is None:
                    if isinstance(error, FileExistsError):
                        raise DataError(f"{self._store.path(self._path(number))} is no file: remove it") from error
                    raise
                if found[1] != nonce:
                    continue
            return [*before, self._keep(number, entry)]

    def _keep(self, number: int, entry: Entry) -> Entry:
        with self._lock:
            if len(self._seen) == number - 1:  # else another thread has read it already
                self._seen.append(entry)
        return entry

    def _read(self, number: int) -> tuple[Entry, str | None] | None:
        """An entry and its nonce, None if there is none of this number."""
        try:
            data = self._store.read(self._path(number))
        except FileNotFoundError:
            return None
        try:
            if not isinstance(record := parse_json(data), dict):
                raise ValueError("no JSON object")
            return self._parse(number, dict(record)), record.get("nonce")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"{self._store.path(self._path(number))} is not a {self._noun} ({error}): {self._remedy}"
            ) from error

    def _path(self, number: int) -> str:
        return f"{self._prefix}/{number:08d}{self._suffix}"
