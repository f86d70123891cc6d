"""lm-eval's gsm8k with and without the plugin, and whether the plugin made it worse.

    python -m evals.gsm8k MODEL [options] [-- vLLM's arguments]
    python -m evals.gsm8k MODEL --serve [options] [-- arguments of vllm serve]
    python -m evals.gsm8k NAME --urls http://stock:8000 http://plugin:8000 [options]

Exit code: 0 not worse, 1 significantly worse (p < 0.05, one-sided, by strict-match or by flexible-extract), 2 it could
not run.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evals import paired, processes, sides
from evals.processes import SideFailed, Task
from evals.sides import BASELINE, PLUGIN, Side
from vllm_b200_plugin import environment
from vllm_b200_plugin.environment import CannotRun

FILTERS = ("strict-match", "flexible-extract")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Options, and in .vllm what follows --."""
    own, vllm = sides.split(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m evals.gsm8k", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder or name on the hub; with --urls the name that the servers give it")
    parser.add_argument("--data", type=Path, help="folder with train.jsonl and test.jsonl, or the JSONL file of the "
                        "questions beside a train.jsonl; without it openai/gsm8k from the hub")  # fmt: skip
    parser.add_argument("--task", default="gsm8k", help="lm-eval's name of it; default: %(default)s")
    parser.add_argument("--fewshot", type=int, help="worked examples before a question; default: the task's 5")
    parser.add_argument("--limit", type=int, help="only so many questions")
    parser.add_argument("--serve", action="store_true", help="through a vllm serve of each side, not in-process")
    parser.add_argument("--urls", nargs=2, metavar=("BASELINE", "PLUGIN"), help="through servers that are running")
    parser.add_argument("--baseline", default=sides.STOCK, metavar="FEATURES",
                        help="what to compare with: stock, or the plugin without these features")  # fmt: skip
    parser.add_argument("--out", type=Path, help="results, and what to go on from; default: results/gsm8k/MODEL")
    parser.add_argument("--fresh", action="store_true", help="replace results of other settings in --out")
    parser.add_argument("--chunk", type=int, default=256, help="questions at once, and lost at most when interrupted; "
                        "default: %(default)s")  # fmt: skip
    parser.add_argument("--concurrency", type=int, default=64, help="requests at once to a server; %(default)s")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds a --serve may take to start; %(default)s")
    options = parser.parse_args(own)
    options.vllm = vllm
    for name in ("fewshot", "limit", "chunk", "concurrency"):
        value = getattr(options, name)
        if value is not None and value < (name != "fewshot"):
            parser.error(f"--{name} takes a whole number from {int(name != 'fewshot')} on, got {value}")
    if options.urls and (options.serve or vllm or options.baseline != sides.STOCK):
        parser.error("--urls names servers that are running: --serve, --baseline and vLLM's arguments do nothing there")
    return options


def data_files(data: Path | None) -> dict[str, str] | None:
    """{"train": path, "test": path}, or None for the hub. Raises CannotRun for files that gsm8k's task cannot read."""
    if data is None:
        return None
    if not data.exists():
        raise CannotRun(f"--data {data} does not exist.")
    test = data / "test.jsonl" if data.is_dir() else data
    train = test.parent / "train.jsonl"
    for file, use in ((test, "the questions"), (train, "the worked examples before each question")):
        if not file.is_file():
            raise CannotRun(f"--data {data}: there is no {file.name} beside or in it, for {use}.")
        with file.open() as lines:
            for number, line in enumerate(lines, 1):
                _check_row(file, number, line)
    return {"train": str(train.absolute()), "test": str(test.absolute())}


def _check_row(file: Path, number: int, line: str) -> None:
    try:
        row = json.loads(line)
    except ValueError:
        raise CannotRun(f"{file}, line {number} is not JSON.") from None
    for field in ("question", "answer"):
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            raise CannotRun(f"{file}, line {number} has no {field!r}, as gsm8k has.")


def run(options: argparse.Namespace) -> int:
    """Both sides, their comparison on the screen and in result.json; the exit code. Raises CannotRun, SideFailed."""
    environment.check_modules("torch", "transformers")
    if not environment.module_exists("lm_eval"):
        raise CannotRun('lm-eval is not installed: pip install "lm-eval[api]>=0.4.13", or this package with [evals].')
    data = data_files(options.data)
    baseline, plugin = sides.both(options.baseline, tuple(options.urls) if options.urls else None)
    versions: dict[str, str] = {"lm_eval": environment.version_of("lm-eval") or "?"}
    model = options.model
    if options.urls:
        for side in (baseline, plugin):
            assert side.url is not None
            sides.served_model(side.url, model)
    else:
        versions |= sides.check_installed()
        model = sides.check_model(model, options.vllm)
    out = (options.out or Path("results", "gsm8k", Path(model).name)).absolute()
    settings = {
        "model": model,
        "model files": sides.model_digest(model),
        "data": {name: digest(Path(file)) for name, file in data.items()} if data else "hub",
        "task": options.task,
        "fewshot": options.fewshot,
        "limit": options.limit,
        "vllm arguments": options.vllm,
        "way": "running servers" if options.urls else "vllm serve" if options.serve else "in-process",
        "chunk": options.chunk,
        "concurrency": options.concurrency,
    }
    results = {}
    for side in (baseline, plugin):
        sides.claim(out / side.name, {**settings, **sides.identity(side, versions)}, options.fresh)
    for side in (baseline, plugin):
        results[side.name] = _side(side, options, model, data, out / side.name)
    print(f"model     {model}")
    print(f"task      {options.task}, {results[BASELINE]['questions']} questions, {settings['way']}")
    for name, version in versions.items():
        print(f"{name:<9} {version}")
    comparisons = {name: compare(results[BASELINE], results[PLUGIN], name) for name in FILTERS}
    print("\n" + report(baseline.what, plugin.what, comparisons))
    worse = [name for name, comparison in comparisons.items() if comparison.significantly_worse]
    content = {
        "settings": settings,
        "versions": versions,
        "baseline": baseline.what,
        "plugin": plugin.what,
        "comparison": {name: asdict(comparison) for name, comparison in comparisons.items()},
        "significantly worse": worse,
        "sides": results,
    }
    (out / "result.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"\n{verdict(worse)}\nsaved with all answers: {out / 'result.json'}")
    return 1 if worse else 0


def request(options: argparse.Namespace, data: dict[str, str] | None) -> dict[str, Any]:
    """What lm_eval_worker takes besides a model and vLLM's arguments, in-process."""
    names = ("task", "fewshot", "limit", "chunk", "concurrency")
    return {"data": data, "url": None, "check": False, **{name: getattr(options, name) for name in names}}


def digest(file: Path) -> str:
    """Changes with the file's content."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def _side(
    side: Side, options: argparse.Namespace, model: str, data: dict[str, str] | None, folder: Path
) -> dict[str, Any]:
    """Results of a side, computed unless they are there. Raises CannotRun, SideFailed."""
    file = folder / "results.json"
    if not file.exists():
        asked = {**request(options, data), "model": model, "arguments": options.vllm}
        offline = sides.offline_environment(model, bool(data))
        if options.serve or side.url:
            if options.serve and side.name == BASELINE:  # before the minutes that a server takes
                check = {**asked, "check": True}
                processes.run(Task("lm_eval_worker", check, folder, offline, "task and dataset"))
            with sides.running_server(side, model, options.vllm, folder, options.timeout) as (url, name):
                asked |= {"url": url, "model": name}
                processes.run(Task("lm_eval_worker", asked, folder, offline, side.what))
        else:
            processes.run(Task("lm_eval_worker", asked, folder, {**offline, **side.env}, side.what))
    result = json.loads(file.read_text())
    if not (options.serve or side.url):
        sides.check_features(side, result["features"])
    return result


def compare(baseline: dict[str, Any], plugin: dict[str, Any], name: str) -> paired.Paired:
    """Two sides' results.json by one of FILTERS. Raises SideFailed where they answered different questions."""
    verdicts = []
    for result in (baseline, plugin):
        verdicts.append({entry["id"]: entry["right"] for entry in result["samples"] if entry["filter"] == name})
    if verdicts[0].keys() != verdicts[1].keys() or not verdicts[0]:
        raise SideFailed(f"the two sides did not answer the same questions ({name}): run both again with --fresh.")
    ids = sorted(verdicts[0])
    return paired.compare([verdicts[0][id_] for id_ in ids], [verdicts[1][id_] for id_ in ids])


def report(baseline: str, plugin: str, comparisons: dict[str, paired.Paired]) -> str:
    """The table, and the paired comparison in words."""
    width = max(len(baseline), len(plugin), 20)
    lines = [f"{'exact_match':<18} {baseline:>{width}} {plugin:>{width}}"]
    for name, c in comparisons.items():
        before, after = f"{c.baseline:.4f} ± {c.baseline_stderr:.4f}", f"{c.plugin:.4f} ± {c.plugin_stderr:.4f}"
        lines.append(f"{name:<18} {before:>{width}} {after:>{width}}")
    for name, c in comparisons.items():
        lines += [
            "",
            f"{name}: {c.lost} answers lost, {c.gained} gained, of {c.questions}",
            f"  McNemar's exact p: worse {c.p_worse:.3g} (one-sided), changed {c.p_changed:.3g} (two-sided)",
            f"  smallest drop that is significant with so many changes: {c.smallest_significant:.4f}; "
            f"detected with {paired.POWER:.0%} chance: {c.detectable:.4f}",
        ]
    return "\n".join(lines)


def verdict(worse: Sequence[str]) -> str:
    if worse:
        return f"WORSE: the plugin is significantly worse by {' and '.join(worse)}"
    return "not worse: no significant drop"


def main(arguments: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    return processes.exit_code(lambda: run(options), "from here")


if __name__ == "__main__":
    sys.exit(main())
