"""The tables of explain as one HTML page that needs nothing else."""

from html import escape
from typing import Any

from vllm_b200_plugin.explain import costs, render
from vllm_b200_plugin.explain.gpus import gpu

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --mark: #0a7d3c; --soft: #8882; }
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1500px; padding: 0 1.5em; }
h1 { font-size: 1.4em; } h2 { font-size: 1.1em; margin-top: 2em; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .35em .6em; border-bottom: 1px solid var(--line); }
th { border-bottom-width: 2px; white-space: nowrap; } td.n, th.n { text-align: right; white-space: nowrap; }
code { font: 12.5px/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }
tr.changed td:first-child { border-left: 4px solid var(--mark); }
tr.changed .now { color: var(--mark); font-weight: 600; }
.stock { opacity: .75; } .note { opacity: .75; max-width: 75em; margin: .3em 0; }
th:nth-child(2) { width: 20%; } th:nth-child(3) { width: 17%; }
th:nth-child(4) { width: 32%; } th:nth-child(5) { width: 14%; }
details { background: var(--soft); border-radius: 4px; padding: .1em .6em; margin-top: .3em; }
summary { cursor: pointer; } dl { margin: .3em 0; } dt { font-weight: 600; } dd { margin: 0 0 .3em 1em; }
"""


def html(tables: list[dict[str, Any]]) -> str:
    body = "".join(_table(table) for table in tables)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>vllm-b200 explain</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f"<h1>Which kernel every layer gets</h1>{body}</body></html>\n"
    )


def _table(table: dict[str, Any]) -> str:
    job, rows, stock = table["job"], table["rows"], table.get("stock", [])
    pretended = gpu(job["capability"])
    total = costs.total(rows, pretended, 1, render.CONTEXT)
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.get("notes", []))
    ops = ", ".join(f"<code>{escape(name)}</code>" for name in table.get("overridden_ops", []))
    head = (
        '<tr><th class="n">layers</th><th>layer</th><th>shape on a rank</th><th>kernel by tokens</th>'
        '<th>quantiser, cache write</th><th class="n">read, MB</th><th class="n">launches</th>'
        '<th class="n">floor, µs</th></tr>'
    )
    last = (
        f'<tr><td class="n"></td><td colspan="4">a decode step</td><td class="n">{total.bytes / 1e6:.2f}</td>'
        f'<td class="n">{total.launches}</td><td class="n">{total.floor_us:.1f}</td></tr>'
    )
    return (
        f"<h2>{escape(render.heading(table))}</h2>{notes}<table><thead>{head}</thead><tbody>"
        + "".join(_row(row, render.changed(row, stock), pretended) for row in rows)
        + f"{last}</tbody></table>"
        f'<p class="note">Bytes, launches and floor are arithmetic, not measurement: one sequence of {render.CONTEXT} '
        f"tokens, {pretended.bandwidth / 1e12:.2f} TB/s as published, for one layer. Norms, rotary embedding, "
        "activations outside experts, sampling and collectives are not in the table. Green: stock vLLM runs "
        "something else.</p>" + (f'<p class="note">Ops of vLLM that run our kernel: {ops}.</p>' if ops else "")
    )


def _row(row: dict[str, Any], stock: dict[str, Any] | None, pretended: Any) -> str:
    cost = costs.cost(row, pretended, 1, render.CONTEXT)
    launches = "?" if cost.launches is None else str(cost.launches)
    parts = render.ranges(row)
    choices = "".join(
        f"<p class=note>{escape(choice['reason'])}</p>"
        if len(parts) == 1 and choice["kernel"] == row["kernel"]
        else f"<dt>{tokens} token{'' if tokens == '1' else 's'}: <code>{escape(choice['kernel'])}</code></dt>"
        f"<dd>{escape(choice['reason'])}</dd>"
        for tokens, choice in parts
    )
    refused = "".join(
        f"<dt><code>{escape(', '.join(names))}</code></dt><dd>{escape(reason)}</dd>"
        for reason, names in render.refusals(row).items()
    )
    was = f'<div class="stock">stock: <code>{escape(render.stock_runs(row, stock))}</code></div>' if stock else ""
    more = f"<details><summary>{len(row['passed_over'])} passed over</summary><dl>{refused}</dl></details>"
    return (
        f'<tr{" class=changed" if stock else ""}><td class="n">{row["count"]}</td>'
        f"<td><code>{escape(row['name'])}</code><br>{escape(row['kind'])}</td>"
        f"<td>{escape(row['shape'])}<br><code>{escape(row['weights'])}</code></td>"
        f'<td><code class="now">{escape(row["kernel"])}</code>{was}<dl>{choices}</dl>{more if refused else ""}</td>'
        f"<td><code>{escape(row['quantiser'])}</code></td>"
        f'<td class="n">{cost.bytes / 1e6:.2f}</td><td class="n">{launches}</td>'
        f'<td class="n">{cost.floor_us:.2f}</td></tr>'
    )
