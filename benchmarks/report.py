"""One self-contained HTML page from records of benchmarks.kernels, a plot and a table for each op and shape:
python -m benchmarks.report OUT.html RECORD.jsonl ..."""

import html
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.compare import read_record

Row = dict[str, Any]
Record = tuple[dict[str, Any], list[Row]]

COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 272, 56, 12, 26, 52

STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; max-width: 1340px; margin: 2em auto; padding: 0 1em; color: #222 }
h2 { margin-top: 2.2em; border-bottom: 1px solid #ccc } h3 { margin: 1.6em 0 .3em; font-weight: 600 }
table { border-collapse: collapse; font-size: 12.5px } td, th { padding: 2px 9px; text-align: right }
th { border-bottom: 1px solid #999 } td:first-child, th:first-child, td.text { text-align: left }
tr.ours td { background: #fdeeee } td.bad { color: #b00; font-weight: 600 }
figure { display: inline-block; margin: 0 } svg text { font-size: 11px }
details { margin: .4em 0 1em } summary { cursor: pointer; color: #555 }
"""

INTRODUCTION = """
<p>Every implementation of an op was run on the same inputs. Before it was timed, its output, written into poisoned
buffers, was compared with a float64 reference on the same operands; a wrong one is marked and has no time. Times are
medians of replayed CUDA graphs, the implementations taking turns, with inputs rotated past twice the L2 cache
("cold"), or left in it where they are so small that a decode step finds them there ("hot"). <b>Chained</b> is what the
op adds behind a kernel that writes as much as its activations. <b>Share of ceiling</b> divides the bytes that any
implementation has to move by the time and by the bandwidth of an elementwise kernel measured in the same run; it can
pass 100 % only where data stays in the L2. <b>Ratio</b> is the best peer's time over this one's: above 1 is faster
than every other implementation.</p>
"""


def write_report(path: str | Path, records: Sequence[Record]) -> None:
    Path(path).write_text(render(records))


def render(records: Sequence[Record]) -> str:
    sections, environments = [], []
    for env, rows in records:
        ops = list(dict.fromkeys(row["op"] for row in rows))
        environments.append(_environment(", ".join(ops), env))
        for op in ops:
            sections.append(f"<h2>{html.escape(op)}</h2>")
            groups: dict[str, list[Row]] = defaultdict(list)
            for row in rows:
                if row["op"] == op:
                    groups[_shape(row)].append(row)
            sections += [_section(shape, group) for shape, group in groups.items()]
    gpus = dict.fromkeys(str(env.get("gpu", "a CPU")) for env, _ in records)
    title = f"Kernel benchmark on {', '.join(gpus)}"
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
        f"<h1>{html.escape(title)}</h1>{INTRODUCTION}{''.join(environments)}{''.join(sections)}</html>"
    )


def _environment(ops: str, env: dict[str, Any]) -> str:
    facts = "".join(
        f"<tr><td>{html.escape(k)}</td><td class=text>{html.escape(str(v))}</td></tr>" for k, v in env.items()
    )
    return f"<details><summary>Environment of {html.escape(ops)}</summary><table>{facts}</table></details>"


def _shape(row: Row) -> str:
    """What the rows of one plot share: all but the number of tokens and the implementation."""
    size = "x".join(str(row[key]) for key in ("n", "k") if row.get(key) is not None)
    extra = [str(row[key]) for key in ("dtype", "layout") if row.get(key)]
    return ", ".join([size, *extra])


def _section(shape: str, rows: list[Row]) -> str:
    timed = [row for row in rows if "us" in row]
    plots = ""
    if len({row["m"] for row in timed}) > 1:
        plots = "".join(
            _plot(title, timed, key, log_y)
            for title, key, log_y in (
                ("us against tokens", "us", True),
                ("share of ceiling", "share_of_ceiling", False),
                ("ratio to best peer", "ratio_to_best_peer", False),
            )
        )
    return f"<h3>{html.escape(shape)}</h3>{plots}<details><summary>{len(rows)} rows</summary>{_table(rows)}</details>"


def _table(rows: list[Row]) -> str:
    columns = ("m", "us", "us_spread", "us_chained", "gbs", "tflops", "share_of_ceiling", "ratio_to_best_peer")
    head = "".join(f"<th>{name}</th>" for name in ("implementation", *columns, "best_peer", "l2", "check"))
    body = []
    for row in rows:
        cells = "".join(f"<td>{'' if row.get(c) is None else row[c]}</td>" for c in columns)
        if "missing" in row:
            check = f"<td class=text>missing: {html.escape(row['missing'])}</td>"
        else:
            check = "<td class=text>right</td>" if row["correct"] else "<td class='text bad'>WRONG, not timed</td>"
        kind = " class=ours" if row["impl"] == "ours" else ""
        body.append(
            f"<tr{kind}><td>{html.escape(row['impl'])}</td>{cells}"
            f"<td>{html.escape(row.get('best_peer') or '')}</td><td>{row.get('l2', '')}</td>{check}</tr>"
        )
    return f"<table><tr>{head}</tr>{''.join(body)}</table>"


def _plot(title: str, rows: list[Row], key: str, log_y: bool) -> str:
    """Lines over log2 of the number of tokens, one for each implementation."""
    series: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if row.get(key) is not None and row["m"]:
            series[row["impl"]].append((math.log2(row["m"]), math.log10(max(row[key], 1e-6)) if log_y else row[key]))
    points = [point for line in series.values() for point in line]
    if not points:
        return ""
    x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
    y0, y1 = (
        (min(p[1] for p in points), max(p[1] for p in points)) if log_y else (0.0, max(1.0, *(p[1] for p in points)))
    )
    x1, y1 = max(x1, x0 + 1), max(y1, y0 + (0.3 if log_y else 0.1))

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM),
        )

    parts = [f"<text x={LEFT} y=15 font-weight=600>{html.escape(title)}</text>"]
    for x in sorted({p[0] for p in points}):
        left, bottom = place(x, y0)
        parts.append(f"<line x1={left:.1f} x2={left:.1f} y1={TOP} y2={bottom:.1f} stroke=#eee />")
    last = -math.inf
    for x in sorted({p[0] for p in points}):
        left, bottom = place(x, y0)
        if left - last >= 26:
            parts.append(f"<text x={left:.1f} y={bottom + 14:.1f} text-anchor=middle>{round(2**x)}</text>")
            last = left
    for tick in _ticks(y0, y1, log_y):
        left, top = place(x0, tick)
        label = f"{10**tick:g}" if log_y else f"{tick:g}"
        parts.append(f"<line x1={LEFT} x2={WIDTH - RIGHT} y1={top:.1f} y2={top:.1f} stroke=#ddd />")
        parts.append(f"<text x={LEFT - 6} y={top + 4:.1f} text-anchor=end>{label}</text>")
    for index, (name, line) in enumerate(sorted(series.items(), key=lambda item: (item[0] != "ours", item[0]))):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in sorted(line))
        parts.append(
            f'<polyline points="{path}" fill=none stroke={colour} stroke-width={2.5 if name == "ours" else 1.4} />'
        )
        parts += [f"<circle cx={x:.1f} cy={y:.1f} r=2.4 fill={colour} />" for x, y in (place(*p) for p in line)]
        legend_x, legend_y = LEFT + 4 + index % 4 * 90, HEIGHT - 20 + index // 4 * 13
        parts.append(f"<text x={legend_x} y={legend_y} fill={colour}>{html.escape(name[:14])}</text>")
    label = html.escape(title)
    svg = f"<svg width={WIDTH} height={HEIGHT} role=img aria-label='{label}'>{''.join(parts)}</svg>"
    return f"<figure>{svg}</figure>"


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if log:
        values = [math.log10(m * 10.0**e) for e in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
        return [v for v in values if low - 1e-9 <= v <= high + 1e-9]
    step = 10 ** math.floor(math.log10(high / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if high / (factor * step) <= 6)
    return [i * step for i in range(int(high / step) + 1)]


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    write_report(sys.argv[1], [read_record(path) for path in sys.argv[2:]])
