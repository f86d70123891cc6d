"""What got slower between two records of benchmarks.kernels."""

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_record(path: str | Path) -> tuple[dict[str, Any], list[Row]]:
    """The environment and the rows of a JSON-lines record.

    Raises:
        ValueError: the file is no such record; the message names it and the line.
    """
    lines = [line for line in Path(path).read_text().splitlines() if line.strip()]
    try:
        first, *rows = map(json.loads, lines)
    except ValueError as error:
        raise ValueError(f"{path}: takes JSON lines, the first with the environment ({error})") from None
    if "env" not in first:
        raise ValueError(f'{path}: takes {{"env": ...}} on the first line, got keys {sorted(first)}')
    return first["env"], rows


def slower(old: list[Row], new: list[Row]) -> list[tuple[Row, Row]]:
    """Pairs (old, new) of rows whose time grew by more than both spreads together."""
    before = {_key(row): row for row in old if "us" in row}
    pairs = [(before[_key(row)], row) for row in new if "us" in row and _key(row) in before]
    return [(a, b) for a, b in pairs if b["us"] - a["us"] > a["us_spread"] + b["us_spread"]]


def explain_slower(pairs: list[tuple[Row, Row]]) -> str:
    lines = [
        f"slower: {b['op']} {b['case']} {b['impl']}: {a['us']:.2f} -> {b['us']:.2f} us ({b['us'] / a['us'] - 1:+.1%}, "
        f"spreads {a['us_spread']:.2f} and {b['us_spread']:.2f})"
        for a, b in sorted(pairs, key=lambda pair: pair[0]["us"] / pair[1]["us"])
    ]
    return "\n".join(lines) or "nothing got slower by more than the spread"


def _key(row: Row) -> tuple[str, str, str]:
    return row["op"], row["case"], row["impl"]
