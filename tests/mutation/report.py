"""The results of a mutation run as text: the rate of each room, and what survived."""

from collections import defaultdict


def to_text(results: list[dict]) -> str:
    rooms = defaultdict(list)
    for result in results:
        rooms[result["room"]].append(result["status"])
    lines = ["| room | mutants | killed | survived |", "|---|---|---|---|"]
    for room, statuses in [*sorted(rooms.items()), ("all", [result["status"] for result in results])]:
        noticed = sum(status in ("killed", "hangs") for status in statuses)
        rate = f" ({noticed / len(statuses):.0%})" if statuses else ""
        lines.append(f"| {room} | {len(statuses)} | {noticed}{rate} | {len(statuses) - noticed} |")
    lines += ["", *(_line(result) for result in results if result["status"] not in ("killed", "hangs"))]
    return "\n".join(lines)


def _line(result: dict) -> str:
    cut = "" if result["all_ran"] else f" (after {result['cpu_seconds']:.0f} s of tests)"
    return f"{result['status']}{cut}: {result['name']}  {result['what']}"
