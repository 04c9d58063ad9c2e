"""The kinds of failure that a user is meant to read."""


class UserError(Exception):
    """Something the user gave is wrong. The message is one sentence that says what to do; the CLI exits with 2."""


class DataError(UserError):
    """Stored data is missing or does not match its digest. The message names the file and the frame."""


class StorageDown(UserError):
    """The storage cannot be reached: no fault of the data or the user. The message names it and its last answer."""
