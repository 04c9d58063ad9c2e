"""Which view of an image a plan takes. Apart from the plan, so that reading a config needs no NumPy."""

from typing import Literal

Views = Literal["mixed", "resize", "crop"]  # mixed: either with equal chance, where an image has a crop
