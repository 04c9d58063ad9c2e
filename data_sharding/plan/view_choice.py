"""The views that a plan may select. A module of its own, so that reading a config needs no NumPy."""

from typing import Literal

Views = Literal["mixed", "resize", "crop"]  # mixed: of an image with a crop, either view with probability 1/2
