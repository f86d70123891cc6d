"""One side of evals.parity in-process: log-probabilities of the texts' tokens, by vllm.LLM in this process.

Writes logprobs.json: tokens of every text, and of every composition the answers in vLLM's server's form.
"""

import json
from pathlib import Path
from typing import Any

import worker_common
from compositions import compositions
from worker_common import Cannot, Status


def work(folder: Path, request: dict[str, Any], status: Status) -> None:
    status(doing="loading the model")
    arguments = worker_common.engine_arguments(request["arguments"])
    from vllm import LLM

    engine = LLM(request["model"], **{"max_logprobs": request["top"], **arguments})
    score(engine, folder, request, status)


def score(engine: Any, folder: Path, request: dict[str, Any], status: Status) -> None:
    """Let a vllm.LLM score the texts in every composition. Raises Cannot."""
    from vllm import SamplingParams

    tokenizer = engine.get_tokenizer()
    if tokenizer is None:
        raise Cannot(f"{request['model']} has no tokenizer here: leave out --skip-tokenizer-init.")
    longest = min(request["tokens"], engine.llm_engine.model_config.max_model_len - 1)
    texts = [list(tokenizer.encode(text))[:longest] for text in request["texts"]]
    parameters = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=request["top"], detokenize=False)
    answers: dict[str, Any] = {}
    for name, batches in compositions(texts).items():
        answers[name] = []
        total = sum(map(len, batches))
        status(doing=f"scoring texts {name}", done=0, total=total)
        for batch in batches:
            outputs = engine.generate([{"prompt_token_ids": ids} for ids in batch], parameters, use_tqdm=False)
            answers[name] += [_plain(output.prompt_logprobs) for output in outputs]
            status(done=len(answers[name]), total=total)
    content = {"texts": texts, "answers": answers, "features": worker_common.plugin_state()}
    (folder / "logprobs.json").write_text(json.dumps(content))


def _plain(logprobs: Any) -> list[dict[int, float] | None]:
    """Log-probability by token for every position; None for the first."""
    return [entry and {token: value.logprob for token, value in entry.items()} for entry in logprobs]


if __name__ == "__main__":
    worker_common.run(work)
