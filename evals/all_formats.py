"""gsm8k and parity of one model in every quantisation format, several engines at once: the record of a GPU.

    python -m evals.all_formats [FOLDER] [options] [-- vLLM's arguments]

Every folder in FOLDER is the model in a format, served by stock vLLM and with the plugin, both in-process. With
--reference-only stock vLLM serves one of them, and every format is compared with that one: for machines where stock
vLLM has no kernel for the others, or another arithmetic, as on a CPU.

What stock vLLM cannot serve is recorded with its reason. Exit code: 0 no format is worse than its baseline, 1 one is:
significantly fewer right answers, or beyond --multiple times its noise floor, or the baseline ran and the plugin did
not; 2 it could not run.
"""

import argparse
import gzip
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evals import gsm8k, parity, processes, scores, sides
from evals.formats_report import STRICT, Compared, Rules, table
from evals.gsm8k import FILTERS
from evals.processes import SideFailed, Task
from evals.scores import Scores
from evals.sides import BASELINE, PLUGIN, Side
from evals.small_math import generate
from vllm_b200_plugin import environment
from vllm_b200_plugin.demo.server import kernels_chosen
from vllm_b200_plugin.environment import CannotRun

CHECKPOINTS = Path(__file__).parent / "small_math" / "checkpoints"


@dataclass(frozen=True)
class Result:
    """Of one format on one side. answers: its results.json. kernels: (ours, vLLM's) lines of the log."""

    answers: dict[str, Any]
    scores: Scores
    kernels: tuple[list[str], list[str]]


Results = dict[tuple[str, str], Result]  # by format and side
Failures = dict[tuple[str, str], SideFailed]


def parse(arguments: list[str]) -> argparse.Namespace:
    """Options, and in .vllm what follows --."""
    own, vllm = sides.split(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m evals.all_formats", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=CHECKPOINTS, help="default: the small model's")
    parser.add_argument("--only", nargs="+", metavar="FORMAT", help="only these folders, and the reference")
    parser.add_argument("--reference", default="bf16", metavar="FORMAT", help="default: %(default)s")
    parser.add_argument("--reference-only", action="store_true", help="stock vLLM serves the reference alone")
    parser.add_argument("--questions", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--data", type=Path, help="as of evals.gsm8k; default: word problems of evals.small_math")
    parser.add_argument("--fewshot", type=int, help="worked examples before a question; default: gsm8k's 5")
    parser.add_argument("--num-texts", type=int, default=32, help="for parity; default: %(default)s")
    parser.add_argument("--tokens", type=int, default=256, help="longest text; default: %(default)s")
    parser.add_argument("--top", type=int, default=20, help="log-probabilities a token; default: %(default)s")
    parser.add_argument("--multiple", type=float, default=4, help="of the noise floor; default: %(default)s")
    parser.add_argument("--least-floor", type=float, default=1e-5, metavar="NATS", help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=4, help="engines at once, over all GPUs; default: %(default)s")
    parser.add_argument("--time-limit", type=float, default=math.inf, metavar="SECONDS",
                        help="end the engines that are not done then, and write what there is")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR",
                        help="for records.jsonl, answers.jsonl.gz, summary.md")  # fmt: skip
    parser.add_argument("--work", type=Path, default=Path("results", "all_formats"), metavar="DIR",
                        help="logs, and what to go on from when interrupted; default: %(default)s")  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="replace results of other settings in --work")
    options = parser.parse_args(own)
    options.vllm, options.limit, options.task = vllm, options.questions, "gsm8k"
    options.chunk, options.concurrency = options.questions, 1
    for name, least in (("questions", 1), ("num_texts", 1), ("tokens", 2), ("top", 1), ("jobs", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} takes a whole number from {least} on")
    if not options.multiple > 0 or not options.least_floor > 0:
        parser.error("--multiple and --least-floor take numbers above 0")
    return options


def formats(folder: Path, only: Sequence[str] | None, reference: str) -> list[Path]:
    """The models in `folder`, the reference first. Raises CannotRun."""
    found = {path.parent.name: path.parent for path in sorted(folder.glob("*/config.json"))}
    if not found:
        raise CannotRun(f"there is no model in {folder}: it takes folders with a config.json each.")
    if missing := sorted({reference, *(only or ())} - found.keys()):
        raise CannotRun(f"{folder} has no {', '.join(missing)}, it has {', '.join(found)}.")
    names = [reference, *(name for name in found if name != reference and (only is None or name in only))]
    return [found[name] for name in names]


def run(options: argparse.Namespace) -> int:
    """All engines, the records, and the table on the screen; the exit code. Raises CannotRun, SideFailed."""
    versions = {**sides.check_installed(), "lm_eval": environment.version_of("lm-eval") or "?"}
    if not environment.module_exists("lm_eval"):
        raise CannotRun('lm-eval is not installed: pip install "lm-eval[api]>=0.4.13", or this package with [evals].')
    models = formats(options.folder, options.only, options.reference)
    data = gsm8k.data_files(options.data or _word_problems(options.work, options.questions))
    assert data is not None
    texts = scores.word_problems(options.num_texts)
    asked = {**gsm8k.request(options, data), "parity": parity.request(texts, options.tokens, options.top)}
    settings = {
        "data": {name: gsm8k.digest(Path(file)) for name, file in data.items()},
        "vllm arguments": options.vllm,
        **{name: getattr(options, name) for name in ("questions", "fewshot", "num_texts", "tokens", "top")},
    }
    work = options.work.absolute()
    keys, tasks, gpus = [], [], itertools.cycle(_gpus())
    for model in models:
        for side in sides.both(sides.STOCK):
            if side.name == BASELINE and options.reference_only and model.name != options.reference:
                continue
            path = sides.check_model(str(model), options.vllm)
            folder = work / model.name / side.name
            own = {"model": path, "model files": sides.model_digest(path), **sides.identity(side, versions)}
            sides.claim(folder, {**settings, **own}, options.fresh)
            keys.append((model.name, side))
            env = {**sides.offline_environment(path, own_data=True), **side.env, **next(gpus)}
            request = {**asked, "model": path, "arguments": options.vllm}
            tasks.append(Task("both_worker", request, folder, env, f"{model.name} {side.what}"))
    waiting = [i for i, task in enumerate(tasks) if not (task.folder / "logprobs.json").exists()]
    label = f"{len(models)} formats"
    rules = Rules(**{name: getattr(options, name) for name in Rules.__dataclass_fields__})

    def write(errors: Mapping[int, SideFailed]) -> tuple[list[Compared], Results, Failures]:
        """What is known, on disk: a run that is cut short keeps what it has."""
        failed = {(keys[waiting[i]][0], keys[waiting[i]][1].name): error for i, error in errors.items()}
        results = {}
        for (name, side), task in zip(keys, tasks, strict=True):
            if (name, side.name) in failed:
                continue
            if (task.folder / "logprobs.json").exists():
                results[name, side.name] = _read(side, task.folder)
            else:
                failed[name, side.name] = SideFailed(f"{task.label} has not ended.", "had not ended by then")
        compared = [_compare(model, results, failed, options) for model in models]
        _write(options.out, rules, settings, versions, compared, results)
        return compared, results, failed

    compared, results, failed = write(
        processes.run_all([tasks[i] for i in waiting], options.jobs, label, options.time_limit, write)
    )
    print(table(compared, rules))
    if not any(name == PLUGIN for _, name in results):
        raise SideFailed(f"no engine with the plugin ran: {next(iter(failed.values()))}")
    return 0 if all(found.verdict(rules) in ("same", "-") for found in compared) else 1


def _gpus() -> list[dict[str, str]]:
    """The environment of an engine on each GPU; one that changes nothing where there is none to choose."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(str(index) for index in range(len(environment.gpus())))
    return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in visible.split(",") if gpu] or [{}]


def _word_problems(work: Path, questions: int) -> Path:
    folder = work / f"data-{questions}"
    try:
        generate.write(folder, seed=0, train=100, test=questions, new_templates=1)
    except (OSError, ValueError) as error:
        raise CannotRun(f"the questions cannot be made in {folder}: {error}.") from None
    return folder


def _read(side: Side, folder: Path) -> Result:
    answers = json.loads((folder / "results.json").read_text())
    sides.check_features(side, answers["features"])
    log = (folder / "log").read_text(errors="replace").splitlines()
    return Result(answers, scores.read(json.loads((folder / "logprobs.json").read_text())), kernels_chosen(log))


def _compare(
    model: Path,
    results: Results,
    failed: Failures,
    options: argparse.Namespace,
) -> Compared:
    found = Compared(model.name, parity.quantisation(str(model)))
    reference = options.reference, BASELINE
    keys = {BASELINE: reference if options.reference_only else (model.name, BASELINE), PLUGIN: (model.name, PLUGIN)}
    for side, key in keys.items():
        if key in failed:
            found.failed[side] = failed[key].cause
        else:
            counted = results[key].answers["results"]
            found.accuracy[side] = {name: counted[f"exact_match,{name}"] for name in FILTERS}
            found.kernels[side] = results[key].kernels
    if PLUGIN in found.failed:
        return found
    plugin = results[keys[PLUGIN]]
    found.own = scores.own_noise(plugin.scores, options.top)
    if BASELINE not in found.failed:
        baseline = results[keys[BASELINE]]
        found.gsm8k = {name: gsm8k.compare(baseline.answers, plugin.answers, name) for name in FILTERS}
        found.rows = scores.compare(baseline.scores, plugin.scores, options.top)
    if reference in results:
        found.to_reference = scores.difference(
            results[reference].scores, "together", plugin.scores, "together", options.top
        )
    return found


def _write(
    out: Path,
    rules: Rules,
    settings: dict[str, Any],
    versions: dict[str, str],
    compared: Sequence[Compared],
    results: Results,
) -> None:
    from benchmarks.environment import environment as measured_on

    out.mkdir(parents=True, exist_ok=True)
    lines = [{"env": {**measured_on(), **versions}, "settings": {**settings, **asdict(rules)}}]
    lines += [found.record(rules) for found in compared]
    (out / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (out / "summary.md").write_text(table(compared, rules) + "\n")
    with gzip.GzipFile(out / "answers.jsonl.gz", "wb", mtime=0) as file:
        for line in _answers(results):
            file.write((json.dumps(line) + "\n").encode())


def _answers(results: Results) -> Iterator[dict[str, Any]]:
    """A line for each answer of each engine, with the number that strict-match found."""
    for (name, side), result in results.items():
        for sample in result.answers["samples"]:
            if sample["filter"] == STRICT:
                kept = {key: sample[key] for key in ("id", "answer", "extracted", "right")}
                yield {"format": name, "side": side, **kept}


def main(arguments: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    return processes.exit_code(lambda: run(options), "with the engines that are not done")


if __name__ == "__main__":
    sys.exit(main())
