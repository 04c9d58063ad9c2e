"""The errors whose messages are written for the user."""


class UserError(Exception):
    """An input is wrong. The message is one sentence that names the problem and the fix; the CLI exits with 2."""


class DataError(UserError):
    """Stored data is missing or does not match its digest. The message names the file and the frame."""


class StorageDown(UserError):
    """The storage does not answer; neither the data nor the user is at fault. The message has the last error."""
