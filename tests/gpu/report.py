"""The results as a section of a page, each measured figure beside what was predicted."""

from collections.abc import Iterable, Sequence
from typing import Any

from tests.gpu.predictions import PREDICTIONS, Prediction
from tests.gpu.results import Results

_SHOWN = 12  # kernels


def to_markdown(results: Results) -> str:
    sections = [_predicted, _steps, _products, _attention, _kernels, _jobs]
    return "\n\n".join(["## On a GPU", _machine(results), *filter(None, (s(results) for s in sections))]) + "\n"


def found(results: Results, path: Sequence[str]) -> Any:
    """The value at ``path``, a job and keys of what it measured; None if there is none."""
    at: Any = results.get(path[0], {}).get("result")
    for key in path[1:]:
        at = at.get(key) if isinstance(at, dict) else None
    return at


def measured(results: Results, prediction: Prediction) -> float | None:
    value = found(results, prediction.path)
    if value is None or prediction.over is None:
        return None if value is None else float(value)
    divisor = found(results, prediction.over)
    return value / divisor if divisor else None


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) if len(lines) > 2 else ""


def _number(value: float | None) -> str:
    """To four figures, whole numbers as they are; large ones in thousands of millions."""
    if value is None:
        return "-"
    return f"{value / 1e9:.4g}" if value >= 1e9 else f"{value:.4g}"


def _machine(results: Results) -> str:
    machine = found(results, ["machine"]) or {}
    told = ", ".join(f"{name} {value}" for name, value in machine.items())
    dry = "A dry run in the smallest sizes: these figures say nothing. " if machine.get("device") == "CPU" else ""
    return f"{dry}{told or 'The machine is not known'}."


def _range(prediction: Prediction) -> str:
    low, high = prediction.low, prediction.high
    if low is None or high is None:
        return f"≥ {_number(low)}" if high is None else f"≤ {_number(high)}"
    return _number(low) if low == high else f"{_number(low)} - {_number(high)}"


def _is_off(prediction: Prediction, value: float) -> bool:
    """Outside the range; a single figure is met within 5 % of it."""
    low, high = prediction.low, prediction.high
    slack = 0.05 * abs(high) if low == high and high is not None else 0.0
    return (low is not None and value < low - slack) or (high is not None and value > high + slack)


def _predicted(results: Results) -> str:
    rows = []
    for prediction in PREDICTIONS:
        value = measured(results, prediction)
        shown = _number(value)
        off = value is not None and _is_off(prediction, value)
        rows.append((prediction.figure, _range(prediction), f"**{shown}**" if off else shown))
    note = (
        "Predicted before there was a GPU, for an earlier version; **bold**: outside, or over 5 % from a single figure."
    )
    return f"{note}\n\n{_table(('figure', 'predicted', 'measured'), rows)}"


def _steps(results: Results) -> str:
    rows = []
    for name, outcome in results.items():
        step = outcome["result"]
        if isinstance(step, dict) and "seconds_a_step" in step:
            peaks = [_number(step[key]) for key in ("peak_bytes", "planned_peak_bytes")]
            speed = [
                _number(step["seconds_a_step"]["median"]),
                _number(step["images_per_second"]),
                _number(step["mfu"]),
            ]
            rows.append((name, *speed, *peaks, _number(step["syncs_in_a_step"])))
    return _table(("step", "s", "images/s", "MFU", "peak, GB", "planned", "synchronisations"), rows)


def _products(results: Results) -> str:
    rows = []
    for tokens, products in (found(results, ["ceilings", "products"]) or {}).items():
        for name, rates in products.items():
            each = [_number(rate) for rate in rates.values()] if name != "all" else [_number(rates), "", ""]
            rows.append((tokens, name, *each))
    head = ("tokens", "product, TFLOP/s (all: the three together)", "forward", "input gradient", "weight gradient")
    return _table(head, rows)


def _attention(results: Results) -> str:
    rows = [
        (
            name,
            *(_number(a[key]) for key in ("forward", "backward", "us a token and block")),
            _yes(a["same bits each time"]),
        )
        for name, a in (found(results, ["ceilings", "attention"]) or {}).items()
    ]
    return _table(("attention", "forward, TFLOP/s", "backward", "µs a token and block", "equal bits"), rows)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _kernels(results: Results) -> str:
    rows = [
        (f"`{kernel['name'][:80]}`".replace("|", "/"), kernel["kind"], _number(kernel["ms"]), str(kernel["calls"]))
        for kernel in (found(results, ["profile of 3B/2", "kernels"]) or [])[:_SHOWN]
    ]
    return _table(("kernel", "kind", "ms a step", "calls"), rows)


def _jobs(results: Results) -> str:
    rows = []
    for name, outcome in results.items():
        tests = outcome["result"] if isinstance(outcome["result"], dict) and "passed" in outcome["result"] else None
        counts = f"{tests['passed']} passed, {len(tests['skipped'])} skipped" if tests else ""
        failed = f"; failed: {', '.join(tests['failed'])}" if tests and tests["failed"] else ""
        rows.append((name, outcome["status"], f"{outcome['seconds']:.0f}", counts + failed))
    return _table(("what ran", "ended", "s", "tests"), rows)
