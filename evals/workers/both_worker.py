"""One side of evals.gsm8k and of evals.parity in one engine, in-process: results.json and logprobs.json.

The request is that of lm_eval_worker, and in "parity" that of logprobs_worker.
"""

from pathlib import Path
from typing import Any

import lm_eval_worker
import logprobs_worker
import worker_common
from worker_common import Status


def work(folder: Path, request: dict[str, Any], status: Status) -> None:
    status(doing="loading the dataset")
    task = lm_eval_worker.load_task(request, folder)
    status(doing="loading the model")
    texts = request["parity"]
    model = lm_eval_worker.load_model(request, max_logprobs=texts["top"])
    lm_eval_worker.answer(model, task, folder, request, status)
    logprobs_worker.score(model.model, folder, {**texts, "model": request["model"]}, status)


if __name__ == "__main__":
    worker_common.run(work)
