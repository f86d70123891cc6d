"""The table of explain as text."""

from typing import Any

from vllm_b200_plugin.explain import costs
from vllm_b200_plugin.explain.gpus import gpu

CONTEXT = 4096


def text(tables: list[dict[str, Any]], details: bool = True) -> str:
    """All tables, one below the other; details: also why, and what was passed over."""
    return "\n".join(_table(table, details) for table in tables)


def ranges(row: dict[str, Any]) -> list[tuple[str, dict[str, str]]]:
    """[("1 to 16", choice), ...]: neighbouring numbers of tokens with the same kernel are one."""
    found: list[list[Any]] = []
    for tokens, choice in row["choices"].items():
        if found and found[-1][2]["kernel"] == choice["kernel"]:
            found[-1][1] = tokens
        else:
            found.append([tokens, tokens, choice])
    return [(first if first == last else f"{first} to {last}", choice) for first, last, choice in found]


def runs(row: dict[str, Any]) -> str:
    """In one line what a row runs; without numbers of tokens where they make no difference."""
    parts = ranges(row)
    if len(parts) == 1:
        name = parts[0][1]["kernel"]
        return row["kernel"] if name == row["kernel"] else f"{row['kernel']}: {name}"
    return f"{row['kernel']}: " + ", ".join(f"{tokens}: {choice['kernel']}" for tokens, choice in parts)


def stock_runs(row: dict[str, Any], stock: dict[str, Any]) -> str:
    """What stock vLLM runs, with its quantiser where that is the difference."""
    return runs(stock) + (f"; {stock['quantiser']}" if stock["quantiser"] != row["quantiser"] else "")


def changed(row: dict[str, Any], stock: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of stock vLLM for the same layers, where that runs something else."""
    for other in stock:
        if (other["name"], other["shape"]) == (row["name"], row["shape"]):
            same = (runs(other), other["quantiser"]) == (runs(row), row["quantiser"])
            return None if same else other
    return None


def heading(table: dict[str, Any]) -> str:
    job = table["job"]
    ranks = "" if job["tp"] == 1 else f", one of {job['tp']} ranks" + (" with expert parallelism" if job["ep"] else "")
    side = "stock" if job["stock"] else "with the plugin"
    name = gpu(job["capability"]).name
    return f"{job['name']} on {name} ({job['capability']}){ranks}, vLLM {table['vllm']}, {side}"


def _table(table: dict[str, Any], details: bool) -> str:
    job, rows, stock = table["job"], table["rows"], table.get("stock", [])
    pretended = gpu(job["capability"])
    lines = [heading(table)]
    lines += [f"  note: {note}" for note in table.get("notes", [])]
    lines.append(
        f"  {'':1} {'layers':>6}  {'what':<10} {'name':<44} {'read MB':>9} {'launches':>8} {'floor us':>8}  kernel"
    )
    for row in rows:
        cost = costs.cost(row, pretended, 1, CONTEXT)
        launches = "?" if cost.launches is None else str(cost.launches)
        mark = "*" if changed(row, stock) else " "
        lines.append(
            f"  {mark} {row['count']:>6}  {row['kind']:<10} {_short(row['name']):<44} {cost.bytes / 1e6:>9.2f} "
            f"{launches:>8} {cost.floor_us:>8.2f}  {runs(row)}"
        )
    total = costs.total(rows, pretended, 1, CONTEXT)
    lines.append(
        f"    {'':>6}  {'a step':<10} {'':<44} {total.bytes / 1e6:>9.2f} {total.launches:>8} {total.floor_us:>8.1f}"
    )
    lines.append(
        f"    Arithmetic, not measurement: one sequence of {CONTEXT} tokens, {pretended.bandwidth / 1e12:.2f} TB/s as "
        "published; bytes and floor of one layer."
    )
    lines.append(
        "    Norms, rotary embedding, activations outside experts, sampling and collectives are not in the table."
    )
    if stock:
        lines.append("    *: stock vLLM runs something else.")
    if table.get("overridden_ops"):
        lines.append(f"    ops of vLLM that run our kernel: {', '.join(table['overridden_ops'])}")
    if details:
        for alike in _alike(rows, stock):
            lines += _details(alike, changed(alike[0], stock))
    return "\n".join(lines) + "\n"


def _alike(rows: list[dict[str, Any]], stock: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows, those together of which the same is to be said."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        other = changed(row, stock)
        said = [row["kind"], row["weights"], runs(row), row["choices"], row["quantiser"], row["passed_over"]]
        found.setdefault(str([*said, runs(other) if other else ""]), []).append(row)
    return list(found.values())


def _details(rows: list[dict[str, Any]], stock: dict[str, Any] | None) -> list[str]:
    row = rows[0]
    lines = ["", *(f"  {one['count']} x {one['name']}: {one['shape']}" for one in rows)]
    if row["weights"]:
        lines.append(f"    weights     {row['weights']}")
    lines.append(f"    kernel      {row['kernel']}")
    for tokens, choice in ranges(row):
        lines.append(f"    {tokens:<11} {choice['kernel']}: {choice['reason']}")
    if row["quantiser"]:
        lines.append(f"    {'cache write' if row['kind'] == 'attention' else 'quantiser  '} {row['quantiser']}")
    if stock:
        lines.append(f"    stock       {stock_runs(row, stock)}")
    lines += [f"    not         {', '.join(names)}: {reason}" for reason, names in refusals(row).items()]
    return lines


def refusals(row: dict[str, Any]) -> dict[str, list[str]]:
    """Reason -> the candidates that were passed over for it."""
    found: dict[str, list[str]] = {}
    for candidate, reason in row["passed_over"].items():
        found.setdefault(reason, []).append(candidate)
    return found


def _short(name: str) -> str:
    return name.removeprefix("model.").replace("layers.*.", "").replace("mlp.experts.", "experts.")
