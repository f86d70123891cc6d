"""One vLLM engine with dummy weights in a process of its own, driven by JSON lines on stdin.

Commands: {"batch": 8, "rounds": 3} measures, {"prefill": 8192} times the first token of one such prompt, {"profile": 1,
"steps": 16} lists the kernels of a decode step. Every answer is one JSON line on the file descriptor given as the first
argument, so that logs cannot mix with it.
"""

import collections
import json
import os
import statistics
import sys
import time
from typing import Any

DECODE_STEPS = 128
PREFILLS = 5  # of a round


class Worker:
    def __init__(self, model: str, options: dict[str, Any]) -> None:
        import torch
        from vllm import LLM

        self.torch = torch
        start = time.perf_counter()
        self.input_len = options.pop("input_len")
        self.token_ids = (10, min(30000, options.pop("vocab_size")))
        self.llm = LLM(
            model=model,
            load_format="dummy",
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            seed=0,
            **options,
        )
        self.startup_s = time.perf_counter() - start
        self.cuda = torch.cuda.is_available()

    def synchronize(self) -> None:
        if self.cuda:
            self.torch.cuda.synchronize()

    def generate(self, batch: int, tokens: int, input_len: int | None = None) -> float:
        """Seconds to generate `tokens` tokens greedily for `batch` prompts of random tokens."""
        from vllm import SamplingParams

        generator = self.torch.Generator().manual_seed(batch)
        size = (batch, input_len or self.input_len)
        prompts = self.torch.randint(*self.token_ids, size, generator=generator).tolist()
        parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        self.synchronize()
        start = time.perf_counter()
        self.llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)
        self.synchronize()
        return time.perf_counter() - start

    def measure(self, batch: int, rounds: int) -> dict[str, Any]:
        self.generate(batch, 8)
        tpot, ttft = [], []
        for _ in range(rounds):
            firsts = [self.generate(batch, 1) for _ in range(PREFILLS)]
            tpot.append((self.generate(batch, 1 + DECODE_STEPS) - statistics.median(firsts)) / DECODE_STEPS * 1e3)
            ttft += [first * 1e3 for first in firsts]
        return {"batch": batch, "tpot_ms": tpot, "ttft_ms": ttft}

    def prefill(self, tokens: int) -> dict[str, Any]:
        self.generate(1, 1, tokens)
        return {"prefill": tokens, "ttft_ms": [self.generate(1, 1, tokens) * 1e3 for _ in range(PREFILLS)]}

    def profile(self, batch: int, steps: int) -> dict[str, Any]:
        """Microseconds and launches per decode step and kernel: a run of 2 * steps less one of steps tokens.

        On a CPU, torch's operators stand for the kernels.
        """
        activity = self.torch.profiler.ProfilerActivity
        kind = self.torch.autograd.DeviceType.CUDA if self.cuda else self.torch.autograd.DeviceType.CPU
        totals: collections.Counter[str] = collections.Counter()
        launches: collections.Counter[str] = collections.Counter()
        for sign, tokens in ((1, 2 * steps), (-1, steps)):
            with self.torch.profiler.profile(activities=[activity.CUDA if self.cuda else activity.CPU]) as profile:
                self.generate(batch, tokens)
            for event in profile.events():
                if event.device_type == kind:
                    totals[event.name] += sign * (event.device_time if self.cuda else event.self_cpu_time_total)
                    launches[event.name] += sign
        kernels = [
            {"kernel": name, "us": us / steps, "launches": launches[name] / steps}
            for name, us in totals.most_common()
            if launches[name] > 0
        ]
        return {"batch": batch, "kernels": kernels}


def plugin_states() -> dict[str, str]:
    """Feature -> "applied", "pending", "disabled" or why not; empty where vLLM has not loaded the plugin."""
    plugin = sys.modules.get("vllm_b200_plugin.plugin")
    return plugin.results() if plugin else {}


def main() -> None:
    answers = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    worker = Worker(sys.argv[2], json.loads(sys.argv[3]))
    print(json.dumps({"startup_s": worker.startup_s, "plugin": plugin_states()}), file=answers)
    for line in sys.stdin:
        command = json.loads(line)
        if "profile" in command:
            answer = worker.profile(command["profile"], command["steps"])
        elif "prefill" in command:
            answer = worker.prefill(command["prefill"])
        else:
            answer = worker.measure(command["batch"], command["rounds"])
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
