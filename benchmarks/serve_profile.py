"""The kernels of one decode step of two engines, side by side."""

import re
from typing import Any

ROWS_SHOWN = 40
NAME_WIDTH = 62

# Wrappers that say nothing: what they launch is their first template argument.
_WRAPPERS = re.compile(r"\b(?:device_kernel|enable_sm\w+|kernel_wrapper|Kernel2?|cutlass_kernel)$")
_ELEMENTWISE = re.compile(r"(\w+(?:Functor|Ops?|_kernel_impl|kernel_cuda))\b")


def short_name(name: str) -> str:
    """A kernel's name without return type, namespaces that say nothing, arguments and template noise.

    "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<...> > >(...)" is
    "flash::FlashAttnFwdSm90".
    """
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    head, arguments = _split(name)
    while _WRAPPERS.search(head) and arguments:
        head, arguments = _split(arguments)
    head = head.removeprefix("at::native::")
    if "elementwise_kernel" in head or "reduce_kernel" in head:
        found = [word for word in _ELEMENTWISE.findall(arguments) if word not in head]
        head += f" {found[0]}" if found else ""
    return head.strip() or name


def _split(name: str) -> tuple[str, str]:
    """("a::b", "c<d>, e") of "a::b<c<d>, e>(f)"; no arguments where there are none."""
    opening = name.find("<")
    if opening < 0:
        return name.split("(")[0].split(",")[0].strip(), ""
    return name[:opening].strip(), name[opening + 1 :]


def side_by_side(profiles: dict[str, dict[str, Any]], num_layers: int) -> list[dict[str, Any]]:
    """One row a kernel: {"kernel", "short", side: {"us", "launches"} per layer}, the largest time of any side first.

    profiles: side -> {"kernels": [{"kernel": full name, "us": per step, "launches": per step}]}.
    """
    rows: dict[str, dict[str, Any]] = {}
    for side, profile in profiles.items():
        for kernel in profile["kernels"]:
            row = rows.setdefault(kernel["kernel"], {"kernel": kernel["kernel"], "short": short_name(kernel["kernel"])})
            row[side] = {"us": kernel["us"] / num_layers, "launches": kernel["launches"] / num_layers}
    return sorted(rows.values(), key=lambda row: -max(row[side]["us"] for side in profiles if side in row))


def table(profiles: dict[str, dict[str, Any]], num_layers: int) -> str:
    """side_by_side as text, with the totals of all kernels, also of those that are not shown."""
    rows = side_by_side(profiles, num_layers)
    first, second = profiles
    head = f"{'us a layer, launches a layer':{NAME_WIDTH}s}" + "".join(f" {side:>18s}" for side in profiles)
    lines = [head + f" {'difference':>11s}"]
    seen: dict[str, int] = {}
    for row in rows[:ROWS_SHOWN]:
        number = seen[row["short"]] = seen.get(row["short"], 0) + 1
        # Templates that differ only in their arguments: numbered, the record has the full names.
        name = row["short"] if number == 1 else f"{row['short'][: NAME_WIDTH - 4]} #{number}"
        lines.append(_line(name, [row.get(side) for side in profiles]))
    if len(rows) > ROWS_SHOWN:
        rest = rows[ROWS_SHOWN:]
        lines.append(_line(f"({len(rest)} more)", [_sum(rest, side) for side in profiles]))
    totals = [_sum(rows, side) for side in profiles]
    lines.append(_line("total, a layer", totals))
    lines.append(_line(f"total, a step ({num_layers} layers)", [_times(total, num_layers) for total in totals]))
    if totals[1]["us"]:
        lines.append(f"kernel time {first} / {second}: {totals[0]['us'] / totals[1]['us']:.3f}")
    return "\n".join(lines)


def _sum(rows: list[dict[str, Any]], side: str) -> dict[str, float]:
    cells = [row[side] for row in rows if side in row]
    return {"us": sum(cell["us"] for cell in cells), "launches": sum(cell["launches"] for cell in cells)}


def _times(cell: dict[str, float], factor: int) -> dict[str, float]:
    return {key: value * factor for key, value in cell.items()}


def _line(name: str, cells: list[dict[str, float] | None]) -> str:
    columns = [f" {cell['us']:10.2f} {cell['launches']:6.2f}x" if cell else f" {'-':>18s}" for cell in cells]
    first, second = ((cell or {"us": 0.0})["us"] for cell in cells)
    return f"{name[:NAME_WIDTH]:{NAME_WIDTH}s}{''.join(columns)} {second - first:+11.2f}"
