"""What a person sees of a training run: a bar on a terminal; elsewhere a line every ten seconds."""

import sys
import time

from tqdm import tqdm

_LINE_SECONDS = 10.0


class ProgressBar:
    """Use as a context manager; silent unless ``shown``."""

    def __init__(self, start: int, steps: int, shown: bool):
        self._steps, self._lines, self._printed = steps, shown and not sys.stderr.isatty(), 0.0
        self._shown = shown
        self._bar = tqdm(total=steps, initial=start, unit="step", disable=not shown or self._lines, dynamic_ncols=True)

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *exc) -> None:
        self._bar.close()

    def advance(self) -> None:
        self._bar.update()

    def show(self, step: int, metrics: dict[str, float]) -> None:
        text = (
            f"loss {metrics['loss']:.4f}  {metrics['images_per_second']:.1f} images/s  "
            f"{metrics['tokens_per_second']:.0f} tokens/s  fill {metrics['packing_fill']:.3f}"
        )
        if metrics["skipped_steps"]:
            text += f"  skipped {metrics['skipped_steps']:.0f}"
        self._bar.set_postfix_str(text)
        now = time.monotonic()
        if self._lines and (now - self._printed > _LINE_SECONDS or step == self._steps):
            self._printed = now
            self.say(f"step {step}/{self._steps}  {text}")

    def say(self, text: str) -> None:
        if self._shown:
            tqdm.write(text, file=sys.stderr)
