"""Log-probabilities of the same texts, teacher-forced, with the plugin against without it, next to the noise floor.

    python -m evals.parity MODEL [MODEL ...] [options] [-- vLLM's arguments]
    python -m evals.parity NAME --urls http://stock:8000 http://plugin:8000 [options]

The noise floor is the baseline against itself with the texts in other batches. Several models, for example one in
several quantisation formats, end in one table. Exit code: 0 all within --multiple times their floor, 1 one is beyond
it, 2 one could not run. KL is a lower bound, from the top --top log-probabilities: evals/divergence.py.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from evals import processes, scores, sides
from evals.processes import Progress, SideFailed, Task
from evals.scores import Row, Scores
from evals.sides import BASELINE, PLUGIN, Side
from vllm_b200_plugin.environment import CannotRun


@dataclass(frozen=True)
class Outcome:
    """Of one model. rows: none where it could not run, for the reason `problem`."""

    name: str
    quantisation: str
    rows: Sequence[Row] = ()
    problem: str = ""


def parse(arguments: list[str]) -> argparse.Namespace:
    """Options, and in .vllm what follows --."""
    own, vllm = sides.split(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m evals.parity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL",
                        help="folder or name on the hub; with --urls the name that the servers give it")  # fmt: skip
    parser.add_argument("--urls", nargs=2, metavar=("BASELINE", "PLUGIN"), help="servers that are running; they need "
                        "--max-logprobs for a --top above 20")  # fmt: skip
    parser.add_argument("--baseline", default=sides.STOCK, metavar="FEATURES",
                        help="what to compare with: stock, or the plugin without these features")  # fmt: skip
    parser.add_argument("--texts", type=Path, help="file of one text a line; default: made-up word problems")
    parser.add_argument("--num-texts", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=256, help="longest text; default: %(default)s")
    parser.add_argument("--top", type=int, default=20, help="log-probabilities a token; default: %(default)s")
    parser.add_argument("--multiple", type=float, default=4, help="of the noise floor; default: %(default)s")
    parser.add_argument("--least-floor", type=float, default=1e-5, metavar="NATS", help="the noise floor is this at "
                        "least, for models that have none; default: %(default)s")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("results", "parity"), metavar="DIR",
                        help="for DIR/MODEL, results, reused where they are; default: %(default)s")  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="replace results of other settings in --out")
    options = parser.parse_args(own)
    options.vllm = vllm
    for name, least in (("num_texts", 1), ("tokens", 2), ("top", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} takes a whole number from {least} on")
    if not options.multiple > 0 or not options.least_floor > 0:
        parser.error("--multiple and --least-floor take numbers above 0")
    if options.urls and (vllm or options.baseline != sides.STOCK):
        parser.error("--urls names servers that are running: --baseline and vLLM's arguments do nothing there")
    if options.urls and len(options.models) > 1:
        parser.error("--urls takes one model: a server has one")
    names = [Path(model).name for model in options.models]
    if len(set(names)) < len(names):
        parser.error(f"the models take different names, for their results; got {', '.join(names)}")
    return options


def read_texts(file: Path | None, count: int) -> list[str]:
    """The first `count` lines that are not empty, or word problems. Raises CannotRun."""
    if file is None:
        return scores.word_problems(count)
    try:
        lines = [line for line in file.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise CannotRun(f"--texts {file} cannot be read ({error}).") from None
    if not lines:
        raise CannotRun(f"--texts {file} holds no text.")
    return lines[:count]


def run(options: argparse.Namespace) -> int:
    """All models, and their table where there are several; the exit code. Raises CannotRun, SideFailed."""
    texts = read_texts(options.texts, options.num_texts)
    if len(options.models) == 1:
        outcomes = [run_model(options.models[0], options, texts)]
    else:
        outcomes = []
        for model in options.models:
            try:
                outcomes.append(run_model(model, options, texts))
            except (CannotRun, SideFailed) as error:
                print(f"error: {model}: {error}", file=sys.stderr)
                outcomes.append(Outcome(Path(model).name, quantisation(model), problem=str(error)))
            print()
        print(table(outcomes, options.multiple, options.least_floor))
    if any(row.ratio(options.least_floor) > options.multiple for outcome in outcomes for row in outcome.rows):
        return 1
    return 2 if any(outcome.problem for outcome in outcomes) else 0


def run_model(model: str, options: argparse.Namespace, texts: list[str]) -> Outcome:
    """Both sides, their table on the screen and in result.json. Raises CannotRun, SideFailed."""
    baseline, plugin = sides.both(options.baseline, tuple(options.urls) if options.urls else None)
    versions: dict[str, str] = {}
    out = (options.out / Path(model).name).absolute()
    if options.urls:
        for side in (baseline, plugin):
            assert side.url is not None
            sides.served_model(side.url, model)
    else:
        versions = sides.check_installed()
        model = sides.check_model(model, options.vllm)
    settings = {
        "model": model,
        "model files": sides.model_digest(model),
        "texts": hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12],
        "tokens": options.tokens,
        "top": options.top,
        "vllm arguments": options.vllm,
    }
    for side in (baseline, plugin):
        sides.claim(out / side.name, {**settings, **sides.identity(side, versions)}, options.fresh)
    both = {side.name: _side(side, options, model, texts, out / side.name) for side in (baseline, plugin)}
    rows = scores.compare(both[BASELINE], both[PLUGIN], options.top)
    own = scores.own_noise(both[PLUGIN], options.top)
    beyond = [row.composition for row in rows if row.ratio(options.least_floor) > options.multiple]
    print(f"model     {model}, {quantisation(model)}")
    for name, version in versions.items():
        print(f"{name:<9} {version}")
    print("\n" + scores.report(baseline.what, plugin.what, rows, own, options.least_floor))
    content = {
        "settings": {**settings, "multiple": options.multiple, "least floor": options.least_floor},
        "quantisation": quantisation(model),
        "versions": versions,
        "baseline": baseline.what,
        "plugin": plugin.what,
        "rows": [row.record(options.least_floor) for row in rows],
        "plugin in other batches": asdict(own),
        "beyond": beyond,
    }
    (out / "result.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"\n{verdict(beyond, options.multiple)}\nsaved: {out / 'result.json'}")
    return Outcome(Path(model).name, quantisation(model), rows)


def quantisation(model: str) -> str:
    """The model's format as its config names it, where it is a folder."""
    try:
        config = json.loads((Path(model) / "config.json").read_text())
    except (OSError, ValueError):
        return "format not known here"
    quantised = config.get("quantization_config") or {}
    names = [quantised.get("quant_method"), quantised.get("format") or quantised.get("quant_algo")]
    return " ".join(filter(None, names)) or "not quantised"


def request(texts: Sequence[str], tokens: int, top: int) -> dict[str, object]:
    """What logprobs_worker takes besides a model and vLLM's arguments."""
    return {"texts": texts, "tokens": tokens, "top": top}


def _side(side: Side, options: argparse.Namespace, model: str, texts: list[str], folder: Path) -> Scores:
    """Scores of a side, computed unless they are there. Raises CannotRun, SideFailed."""
    file = folder / "logprobs.json"
    if not file.exists():
        if side.url:
            content = scores.ask_server(side.url, model, texts, options.tokens, options.top, Progress(side.what))
            file.write_text(json.dumps(content))
        else:
            asked = {**request(texts, options.tokens, options.top), "model": model, "arguments": options.vllm}
            env = {**sides.offline_environment(model), **side.env}
            processes.run(Task("logprobs_worker", asked, folder, env, side.what))
    content = json.loads(file.read_text())
    if not side.url:
        sides.check_features(side, content["features"])
    return scores.read(content)


def table(outcomes: Sequence[Outcome], multiple: float, least: float) -> str:
    """A line for each model: its composition that is most times its floor."""
    name_width = max(len("model"), *(len(outcome.name) for outcome in outcomes))
    width = max(len("format"), *(len(outcome.quantisation) for outcome in outcomes))
    columns = (
        f"{'mean KL':>9} {'floor':>9} {'99% KL':>9} {'floor':>9} {'top-1':>8} {'floor':>8} {'largest':>9} {'floor':>9}"
    )
    lines = [f"{'model':<{name_width}}  {'format':<{width}}  {'texts':<8} {columns}  x floor"]
    for outcome in outcomes:
        start = f"{outcome.name:<{name_width}}  {outcome.quantisation:<{width}}  "
        if outcome.problem:
            lines.append(start + outcome.problem)
            continue
        row = max(outcome.rows, key=lambda row: row.ratio(least))
        mine, floor = row.difference, row.floor
        kl = f"{mine.mean_kl:>9.2e} {floor.mean_kl:>9.2e} {mine.p99_kl:>9.2e} {floor.p99_kl:>9.2e}"
        rest = f"{mine.top1:>8.2%} {floor.top1:>8.2%} {mine.largest:>9.2e} {floor.largest:>9.2e}"
        ratio = row.ratio(least)
        lines.append(f"{start}{row.composition:<8} {kl} {rest}  {ratio:.3g}{' DIFFERENT' * (ratio > multiple)}")
    return "\n".join(lines)


def verdict(beyond: Sequence[str], multiple: float) -> str:
    if beyond:
        return f"DIFFERENT: more than {multiple:g} times the noise floor with the texts {', '.join(beyond)}"
    return f"same: within {multiple:g} times the noise floor"


def main(arguments: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    return processes.exit_code(lambda: run(options), "with the side that is not done")


if __name__ == "__main__":
    sys.exit(main())
