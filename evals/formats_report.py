"""What evals.all_formats found out about each format, as a record and as a table."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from evals.divergence import Difference
from evals.gsm8k import FILTERS
from evals.paired import Paired
from evals.scores import Row
from evals.sides import BASELINE, PLUGIN

STRICT = FILTERS[0]


@dataclass(frozen=True)
class Rules:
    """multiple, least_floor: as of evals.parity. reference: name of the format that all are compared with.

    reference_only: that is also every format's baseline, else stock vLLM with the same format is.
    """

    questions: int
    multiple: float
    least_floor: float
    reference: str
    reference_only: bool

    @property
    def baseline(self) -> str:
        return f"stock {self.reference}" if self.reference_only else "stock"


@dataclass
class Compared:
    """One format. accuracy: side -> filter -> share of right answers. failed: side -> why it did not run.

    to_reference: how far the plugin is from the reference format on stock vLLM.
    """

    name: str
    quantisation: str
    accuracy: dict[str, dict[str, float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    kernels: dict[str, tuple[list[str], list[str]]] = field(default_factory=dict)
    gsm8k: dict[str, Paired] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    own: Difference | None = None
    to_reference: Difference | None = None

    def worst(self, least: float) -> Row:
        """The composition that is most times its floor."""
        return max(self.rows, key=lambda row: row.ratio(least))

    def verdict(self, rules: Rules) -> str:
        """What is wrong, or: same, - (nothing to compare)."""
        if PLUGIN in self.failed and BASELINE not in self.failed and not rules.reference_only:
            return "the plugin did not run"
        if self.failed:
            return "-"
        wrong = [f"worse by {name}" for name, comparison in self.gsm8k.items() if comparison.significantly_worse]
        if self.worst(rules.least_floor).ratio(rules.least_floor) > rules.multiple:
            wrong.append(f"beyond {rules.multiple:g} times the floor")
        return ", ".join(wrong) or "same"

    def record(self, rules: Rules) -> dict[str, Any]:
        """For JSON."""
        return {
            "format": self.name,
            "quantisation": self.quantisation,
            "verdict": self.verdict(rules),
            "failed": self.failed,
            "accuracy": self.accuracy,
            "gsm8k": {name: asdict(comparison) for name, comparison in self.gsm8k.items()},
            "parity": [row.record(rules.least_floor) for row in self.rows],
            "plugin in other batches": self.own and asdict(self.own),
            "plugin to reference": self.to_reference and asdict(self.to_reference),
            "kernels": {side: {"plugin": ours, "vllm": theirs} for side, (ours, theirs) in self.kernels.items()},
        }


def table(formats: Sequence[Compared], rules: Rules) -> str:
    """Markdown: a line for each format, and what failed."""
    least = rules.least_floor
    head = ["format", rules.baseline, "plugin", "lost", "gained", "p worse", f"to {rules.reference}", "mean KL",
            "floor", "top-1", "x floor", "verdict"]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    reference = next((f.accuracy.get(BASELINE) for f in formats if f.name == rules.reference), None)
    for found in formats:
        share = {side: f"{accuracy[STRICT]:.3f}" for side, accuracy in found.accuracy.items()}
        cells = [found.name, share.get(BASELINE, "-"), share.get(PLUGIN, "-"), *["-"] * 8]
        if comparison := found.gsm8k.get(STRICT):
            cells[3:6] = [str(comparison.lost), str(comparison.gained), f"{comparison.p_worse:.3g}"]
        if reference and PLUGIN in found.accuracy:
            cells[6] = f"{found.accuracy[PLUGIN][STRICT] - reference[STRICT]:+.3f}"
        if found.rows:
            row = found.worst(least)
            cells[7:9] = [f"{row.difference.mean_kl:.2e}", f"{row.floor.mean_kl:.2e}"]
            cells[9:11] = [f"{row.difference.top1:.2%}", f"{row.ratio(least):.3g}"]
        lines.append([*cells, found.verdict(rules)])
    text = [f"| {' | '.join(cells)} |" for cells in lines]
    text += [
        "",
        f"{rules.questions} questions, right by {STRICT}. lost, gained: answers that only {rules.baseline} or only the "
        f"plugin got right. to {rules.reference}: the plugin's share less stock {rules.reference}'s. x floor: KL over "
        "the baseline's in other batches, mean or 99th percentile, whichever is more.",
    ]
    text += [
        f"\n{found.name}, {rules.baseline if side == BASELINE else 'plugin'}: {cause}"
        for found in formats
        for side, cause in found.failed.items()
    ]
    return "\n".join(text)
