"""The figures of `fitv2 bench data`, part by part: those of the plan, and those of scale."""

from collections.abc import Sequence
from typing import Any

from data_sharding.errors import UserError
from fitv2_scale.bench import plan_figures, scale_figures

SCALE = "scale"
PARTS = (*plan_figures.PARTS, SCALE)


def measure(parts: Sequence[str] = PARTS, steps: int | None = None, huge: bool = False) -> dict[str, Any]:
    """The figures of ``parts``; ``steps`` and ``huge`` as in ``plan_figures`` and ``scale_figures``.

    Raises:
        UserError: there is no such part.
    """
    if unknown := sorted(set(parts) - set(PARTS)):
        raise UserError(f"there is no part {unknown[0]}: choose from {', '.join(PARTS)}")
    report = plan_figures.measure([part for part in plan_figures.PARTS if part in parts], steps)
    return report | ({SCALE: scale_figures.measure(huge)} if SCALE in parts else {})


def to_text(report: dict[str, Any]) -> str:
    texts = [plan_figures.to_text({part: report[part] for part in plan_figures.PARTS if part in report})]
    texts += [scale_figures.to_text(report[SCALE])] if SCALE in report else []
    return "\n\n".join(text for text in texts if text)
