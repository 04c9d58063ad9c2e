"""Labels of WebDataset samples: numbers, or names of classes; never a mixture, and never a guess.

A label in a .cls is a text, one in a .json any value. 3, 3.0, "3" and "3.0" are the number 3. Refused are what is no
class: -1, 2.5, NaN, null, true, lists and objects, and what programs write for a missing value; and two labels.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from data_sharding.errors import UserError
from data_sharding.write.entries import listed, refuse_class_names
from data_sharding.write.findings import printable

Label = int | str

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_MISSING = {"nan", "null", "<na>", "nat", "inf", "infinity"}  # in lower case; a class may well be called "none"
_SHOWN = 80  # characters of a label in a sentence
_MOST_CLASSES = 100_000  # without as many samples: ImageNet-21k and the like have fewer


class NoLabel(Exception):
    """There is no label."""


class BadLabel(Exception):
    """The label is no class; the message says what it is."""


class _Object(dict[str, Any]):
    """A JSON object that knows which of its keys are repeated: a dict keeps the last value."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        self.repeated = {key for key, count in Counter(key for key, _ in pairs).items() if count > 1}


def label_of(files: Mapping[str, bytes]) -> Label:
    """The label in a sample's files by suffix: "cls", "json", both or none. Raises NoLabel; BadLabel, also if both have
    one and they differ."""
    if "cls" not in files:
        return _label_of_json(files.get("json", b""))
    label = _label_of_cls(files["cls"])
    with suppress(NoLabel):
        if "json" in files and (other := _label_of_json(files["json"])) != label:
            raise BadLabel(f"is {_shown(label)} in its .cls and {_shown(other)} in its .json")
    return label


def _shown(label: Label) -> str:
    return printable(str(label))[:_SHOWN]


def _label_of_cls(data: bytes) -> Label:
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadLabel("is not UTF-8") from error
    return _of_text(text)


def _label_of_json(data: bytes) -> Label:
    try:
        found = json.loads(data, object_pairs_hook=_Object)
        label = found["label"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise NoLabel from error
    if "label" in found.repeated:
        raise BadLabel('is given more than once in its .json (several "label")')
    if isinstance(label, str):
        return _of_text(label.strip())
    if isinstance(label, bool) or not isinstance(label, int | float):
        raise BadLabel(f"is {json.dumps(label)[:_SHOWN]}, neither a number nor a text")
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
    if text == "None" or text.lstrip("+-").lower() in _MISSING:
        raise BadLabel(f"is {text}, which is no class but a missing value")
    if not text.isprintable():
        raise BadLabel(f"is {printable(text)[:_SHOWN]}, which holds line breaks or control characters")
    return text


def _of_number(number: int | float, text: str) -> int:
    if not math.isfinite(number) or number < 0 or number != int(number):
        raise BadLabel(f"is {text[:_SHOWN]}, which is no class: classes are counted 0, 1, 2, …")
    return int(number)


def refused(where: str, error: BadLabel) -> UserError:
    """The error for the user."""
    return UserError(f"the label of {where} {error}: correct it, or leave the sample out")


def no_label(where: str, explanation: Any) -> UserError:
    """The error for the user."""
    return UserError(f'{where} has no label: put it in a .cls beside it, or as "label" in its .json{explanation}')
