"""Labels of WebDataset samples: numbers, or names of classes; never a mixture, and never a guess.

A label in a .cls is a text, one in a .json any value. 3, 3.0, "3" and "3.0" are the number 3. Refused are what is no
class: -1, 2.5, NaN, null, true, lists and objects.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from data_sharding.errors import UserError
from data_sharding.write.entries import listed, refuse_class_names
from data_sharding.write.findings import printable

Label = int | str

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_MOST_CLASSES = 100_000  # without as many samples: ImageNet-21k and the like have fewer


class NoLabel(Exception):
    """There is no label."""


class BadLabel(Exception):
    """The label is no class; the message says what it is."""


def label_of_cls(data: bytes) -> Label:
    """The label in a .cls. Raises BadLabel."""
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadLabel("is not UTF-8") from error
    return _of_text(text)


def label_of_json(data: bytes) -> Label:
    """The value of "label" in a .json. Raises NoLabel, BadLabel."""
    try:
        label = json.loads(data)["label"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise NoLabel from error
    if isinstance(label, str):
        return _of_text(label.strip())
    if isinstance(label, bool) or not isinstance(label, int | float):
        raise BadLabel(f"is {json.dumps(label)[:80]}, neither a number nor a text")
    return _of_number(label, str(label))


def classes_of(src: str, labels: Mapping[str, Label]) -> tuple[list[str], dict[str, str]]:
    """The classes of samples with these labels (by key), and the class of each sample.

    Numbers are labels themselves: there is a class for each number from 0 to the largest. Names are sorted.

    Raises:
        UserError: numbers and names are mixed, a number is far beyond the number of samples, or two names look alike.
    """
    numbers = {key: label for key, label in labels.items() if isinstance(label, int)}
    if numbers and len(numbers) < len(labels):
        number, name = next(iter(numbers)), next(key for key in labels if key not in numbers)
        raise UserError(
            f"{src} mixes labels that are numbers ({labels[number]} of {printable(number)}) with names "
            f"({printable(str(labels[name]))} of {printable(name)}): use one of the two"
        )
    if not numbers:
        names = sorted({str(label) for label in labels.values()})
        refuse_class_names(src, names)
        return names, {key: str(label) for key, label in labels.items()}
    largest = max(numbers, key=lambda key: numbers[key])
    if numbers[largest] >= max(_MOST_CLASSES, len(labels)):
        raise UserError(
            f"{src}: the label of {printable(largest)} is {numbers[largest]}, but there are only {len(labels)} "
            "samples: labels count classes from 0; if these are ids, write them with a letter before (they are names "
            "then), or number the classes"
        )
    return [str(i) for i in range(numbers[largest] + 1)], {key: str(label) for key, label in numbers.items()}


def describe(sample: str, suffix: str, others: list[str]) -> str:
    """What explains a missing label of a file ``sample``.``suffix`` whose sample has the suffixes ``others`` too."""
    if "." not in suffix:
        return ""
    name = sample.rpartition("/")[2]
    return (
        f"; in a WebDataset a file's name ends at its first dot, so this is the file .{suffix} of the sample {name}"
        + (f" (with {listed(f'.{other}' for other in others)})" if others else "")
        + f", and its label would be {name}.cls: use another sign than the dot in names"
    )


def _of_text(text: str) -> Label:
    if not text:
        raise BadLabel("is empty")
    if _NUMBER.fullmatch(text):
        return _of_number(int(text) if text.isdecimal() and len(text) < 20 else float(text), text)
    if not text.isprintable():
        raise BadLabel(f"is {printable(text)[:80]}, which holds line breaks or control characters")
    return text


def _of_number(number: int | float, text: str) -> int:
    if not math.isfinite(number) or number < 0 or number != int(number):
        raise BadLabel(f"is {text[:80]}, which is no class: classes are counted 0, 1, 2, …")
    return int(number)


def refused(where: str, error: BadLabel) -> UserError:
    """The error for the user."""
    return UserError(f"the label of {where} {error}: correct it, or leave the sample out")


def no_label(where: str, explanation: Any) -> UserError:
    """The error for the user."""
    return UserError(f'{where} has no label: put it in a .cls beside it, or as "label" in its .json{explanation}')
