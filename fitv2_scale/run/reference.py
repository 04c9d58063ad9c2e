"""How people name a commit: RUN@STEP, as in runs/first@1000. CONFIG@STEP, a network at a step, is written alike."""

from data_sharding.errors import UserError


def split_reference(text: str) -> tuple[str, int | None]:
    """ "runs/first@1000" -> ("runs/first", 1000); a text that does not end with @STEP -> (text, None)."""
    name, _, step = text.rpartition("@")
    if name and step.isascii() and step.isdigit():
        return name, int(step)
    return text, None


def parse_reference(text: str, option: str, wanted: str = "RUN@STEP, as in runs/first@1000") -> tuple[str, int]:
    """As ``split_reference``, for the value of ``option``. Raises UserError, "give ``wanted``", if there is no step."""
    name, step = split_reference(text)
    if step is None:
        raise UserError(f"{option} '{text}': give {wanted}")
    return name, step
