"""Figures with their words, as reports print them."""


def counted(number: int, noun: str) -> str:
    """``1 rank``, ``1,024 ranks``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """In the largest unit of which there is at least one, as in ``1.54 days``."""
    units = (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1))
    noun, size = next((unit for unit in units if seconds >= unit[1]), units[-1])
    text = f"{seconds / size:.3g}"
    return f"{text} {noun}{'' if text == '1' else 's'}"


def small(number: float) -> str:
    """With two digits below ten, else a whole number."""
    return f"{number:.2g}" if number < 10 else f"{number:,.0f}"
