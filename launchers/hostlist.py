"""Expands Slurm's short forms of host names and counts, since compute nodes may lack `scontrol`, which does that."""

import itertools
import re

_ITEM = re.compile(r"(?:[^,\[]+|\[[^\]]*\])+")
_PART = re.compile(r"\[([^\]]*)\]|([^\[]+)")


def expand(names: str) -> list[str]:
    """``n[07-09,12],m3`` -> n07 n08 n09 n12 m3, in Slurm's order."""
    hosts: list[str] = []
    for item in _ITEM.findall(names):
        choices = [_numbers(numbers) if numbers else [text] for numbers, text in _PART.findall(item)]
        hosts += map("".join, itertools.product(*choices))
    return hosts


def _numbers(ranges: str) -> list[str]:
    """``07-09,12`` -> 07 08 09 12"""
    numbers: list[str] = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        numbers += [f"{n:0{len(first)}d}" for n in range(int(first), int(last or first) + 1)]
    return numbers


def counts(each: str) -> list[int]:
    """``8(x3),4`` -> 8 8 8 4"""
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in each.split(",")]
    return [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))]
