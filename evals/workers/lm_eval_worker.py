"""One side of evals.gsm8k: lm-eval's own task, through vllm.LLM in this process or a server.

Writes results.json. Answers go to answers.jsonl as they come, and those that are there are not asked again.
"""

import difflib
import hashlib
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import worker_common
from worker_common import Cannot, Status

FILTERS = ("strict-match", "flexible-extract")


def load_task(request: dict[str, Any], folder: Path) -> Any:
    """lm-eval's task of that name, with its dataset from request["data"] where that is given. Raises Cannot."""
    try:
        import lm_eval
        import lm_eval.evaluator
        from lm_eval.tasks import TaskManager

        remote = request["url"] or request["check"]
        importlib.import_module(f"lm_eval.models.{'openai_completions' if remote else 'vllm_causallms'}")
    except ImportError as error:
        raise Cannot(
            f'lm-eval cannot be imported for {sys.executable}: {error}; pip install "lm-eval[api]".'
        ) from error

    # lm-eval's other tasks are ten thousand files to read.
    tasks = Path(lm_eval.__file__).parent / "tasks" / "gsm8k"
    manager = TaskManager(include_defaults=False, include_path=tasks)
    name, data = request["task"], request["data"]
    if name not in manager.all_subtasks:
        near = difflib.get_close_matches(name, manager.all_subtasks, 1)
        hint = f"; {near[0]}?" if near else ""
        raise Cannot(f"lm-eval has no gsm8k task {name!r}, it has {', '.join(sorted(manager.all_subtasks))}{hint}.")
    spec = name
    if data:
        changes = {
            "include": str(manager.task_index[name].yaml_path),
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": data},
        }
        spec = str(folder / "task.yaml")
        Path(spec).write_text(json.dumps(changes))  # JSON is YAML
    try:
        (task,) = manager.load(spec)["tasks"].values()
    except Exception as error:
        where = ", ".join(data.values()) if data else "openai/gsm8k on the hub"
        advice = "" if data else "; without a network, give --data FOLDER with train.jsonl and test.jsonl"
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise Cannot(f"the dataset ({where}) cannot be loaded: {first[0]}{advice}.") from error
    if not {filter_["name"] for filter_ in task.config.filter_list or []} >= set(FILTERS):
        raise Cannot(f"the task {name} does not extract answers by {' and '.join(FILTERS)}: take gsm8k.")
    return task


def load_model(request: dict[str, Any], **engine: Any) -> Any:
    """lm-eval's model: of type local-completions where request["url"] names a server, else vllm.

    engine: arguments of vllm.LLM, where request["arguments"] has no others.
    """
    if request["url"]:
        from lm_eval.models.openai_completions import LocalCompletionsAPI

        # The server tokenizes: it has the tokenizer, and text is what people send.
        return LocalCompletionsAPI(
            base_url=f"{request['url']}/v1/completions",
            model=request["model"],
            tokenizer_backend="None",
            num_concurrent=request["concurrency"],
            max_retries=3,
            timeout=3600,
            eos_string="<|endoftext|>",
        )
    from lm_eval.models.vllm_causallms import VLLM

    engine |= worker_common.engine_arguments(request["arguments"])
    return VLLM(request["model"], batch_size="auto", **engine)


def resumable(answer: Callable[..., list[str]], journal: Path, chunk: int, status: Status) -> Callable[..., list[str]]:
    """lm-eval's generate_until in chunks, remembering every answer in `journal`."""

    def key(request: Any) -> str:
        return hashlib.sha256(json.dumps(request.args).encode()).hexdigest()

    def generate_until(requests: list[Any], **kwargs: Any) -> list[str]:
        known = _read(journal)
        missing = list({key(request): request for request in requests if key(request) not in known}.values())
        done, total = len(requests) - len(missing), len(requests)
        status(doing="answering", done=done, total=total)
        with journal.open("a") as out:
            for start in range(0, len(missing), chunk):
                asked = missing[start : start + chunk]
                for request, text in zip(asked, answer(asked, **kwargs), strict=True):
                    known[key(request)] = text
                    out.write(json.dumps({"key": key(request), "answer": text}) + "\n")
                out.flush()
                status(done=done + start + len(asked), total=total)
        return [known[key(request)] for request in requests]

    return generate_until


def _read(journal: Path) -> dict[str, str]:
    """The answers in it. A line that was being written when the process ended is dropped from the file."""
    whole = journal.read_text().rpartition("\n")[0] if journal.exists() else ""
    journal.write_text(whole + "\n" if whole else "")
    entries = [json.loads(line) for line in whole.splitlines()]
    return {entry["key"]: entry["answer"] for entry in entries}


def work(folder: Path, request: dict[str, Any], status: Status) -> None:
    status(doing="loading the dataset")
    task = load_task(request, folder)
    if request["check"]:
        return
    status(doing="loading the model")
    answer(load_model(request), task, folder, request, status)


def answer(model: Any, task: Any, folder: Path, request: dict[str, Any], status: Status) -> None:
    """Ask lm-eval's model the task's questions."""
    model.generate_until = resumable(model.generate_until, folder / "answers.jsonl", request["chunk"], status)

    import lm_eval
    from lm_eval.tasks import TaskManager

    results = lm_eval.simple_evaluate(
        model,
        tasks=[task],
        num_fewshot=request["fewshot"],
        limit=request["limit"],
        task_manager=TaskManager(include_defaults=False),
        log_samples=True,
    )
    status(doing="writing the results")
    name = request["task"]
    content = {
        "lm_eval": lm_eval.__version__,
        "features": None if request["url"] else worker_common.plugin_state(),
        "results": results["results"][name],
        "questions": len({sample["doc_id"] for sample in results["samples"][name]}),
        "samples": [
            {
                "id": sample["doc_id"],
                "filter": sample["filter"],
                "doc": sample["doc"],
                "target": sample["target"],
                "answer": sample["resps"][0][0],
                "extracted": sample["filtered_resps"][0],
                "right": bool(sample["exact_match"]),
            }
            for sample in results["samples"][name]
        ],
    }
    (folder / "results.json").write_text(json.dumps(content, default=str))


if __name__ == "__main__":
    worker_common.run(work)
