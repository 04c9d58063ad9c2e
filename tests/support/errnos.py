"""Every errno of errno.h by its kind, what each kind must come to, and what an operation came to. The table is written
down here; it is not what the program thinks."""

import errno
from collections.abc import Callable

from data_sharding.errors import DataError, StorageDown, UserError
from data_sharding.stream.frames import UnreadableFrame

MISSING = ("ENOENT", "ENOTDIR", "EISDIR")
NAME = ("ENAMETOOLONG", "ELOOP", "ENOTEMPTY")
EXISTS = ("EEXIST",)
REFUSED = ("EACCES", "EPERM", "EROFS")
FULL = ("ENOSPC", "EDQUOT", "EFBIG")
KINDS = {"missing": MISSING, "name": NAME, "exists": EXISTS, "refused": REFUSED, "full": FULL}
KIND_OF = {getattr(errno, name): kind for kind, names in KINDS.items() for name in names}

# What each kind of errno comes to. "down" is StorageDown, so 75; "sentence" is a UserError, so 2; "lost" is one frame,
# whose images are replaced; "none": there is no such object. The kind "other" is every errno that is not named above.
READS = {
    "missing": "none",
    "name": "sentence",
    "exists": "down",
    "refused": "sentence",
    "full": "down",
    "other": "down",
}
WRITES = dict.fromkeys(KINDS, "sentence") | {"full": "down", "other": "down"}
ALL_CONTINUE = dict.fromkeys([*KINDS, "other"], "continues")


def kind_of(number: int) -> str:
    return KIND_OF.get(number, "other")


def outcome(act: Callable[[], object]) -> str:
    try:
        act()
    except StorageDown:
        return "down"
    except UnreadableFrame:
        return "lost"
    except (UserError, DataError) as error:
        assert str(error) and "\n" not in str(error)
        return "sentence"
    except FileNotFoundError:
        return "none"
    return "continues"
