"""How people name a commit: RUN@STEP, as in runs/first@1000. CONFIG@STEP, a network at a step, is written alike."""

from data_sharding.errors import UserError
from data_sharding.storage.files import exists
from data_sharding.storage.store import Store
from fitv2_scale.run.create import IDENTITY


def split_reference(text: str) -> tuple[str, int | None]:
    """ "runs/first@1000" -> ("runs/first", 1000); a text that does not end with @STEP -> (text, None)."""
    name, _, step = text.rpartition("@")
    if name and step.isascii() and step.isdigit():
        return name, int(step)
    return text, None


def find_reference(text: str) -> tuple[str, int | None]:
    """The run that RUN or RUN@STEP names, and the step. A run whose own name ends so, as one of an earlier version may,
    is that run. Raises UserError if there is also one that has the name before the @."""
    name, step = split_reference(text)
    if step is None or not is_run(text):
        return name, step
    if is_run(name):
        raise UserError(
            f"{text} is a run, and also step {step} of the run {name}: give {text}/ for the one, "
            f"{name}/@{step} for the other"
        )
    return text, None


def parse_reference(text: str, option: str, wanted: str = "RUN@STEP, as in runs/first@1000") -> tuple[str, int]:
    """As ``find_reference``, for the value of ``option``. Raises UserError, "give ``wanted``", if there is no step."""
    name, step = find_reference(text)
    if step is None:
        raise UserError(f"{option} '{text}': give {wanted}")
    return name, step


def is_run(url: str) -> bool:
    return exists(f"{url.rstrip('/')}/{IDENTITY}")


def refuse_name(store: Store) -> None:
    """Raises UserError if the folder of a new run has a name that would be read as RUN@STEP."""
    name, step = split_reference(store.url)
    if step is not None:
        raise UserError(f"{store.url} would be read as step {step} of the run {name}: give the new run another name")
