"""What explain predicts against what an engine has loaded, on the GPU at hand."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.model_shapes import write_model
from vllm_b200_plugin import explain
from vllm_b200_plugin.explain.gpus import GPUS

pytestmark = [pytest.mark.gpu, pytest.mark.serve]

# Few layers: all of a kind get the same kernel.
MODELS = {"qwen3-30b-a3b-fp8": 2, "llama-3.1-8b-fp8": 2, "gpt-oss-120b-mxfp4": 2, "deepseek-v3-fp8": 2}

ENGINE = """
import sys
from vllm import LLM
LLM(model=sys.argv[1], load_format="dummy", skip_tokenizer_init=True, enforce_eager=True, max_model_len=512,
    max_num_seqs=8, max_num_batched_tokens=512, gpu_memory_utilization=0.1, kv_cache_memory_bytes=1 << 28)
"""


def summary(rows):
    """What must agree; a live layer's weights may have been laid out anew."""
    return {
        (row["name"], row["shape"]): {
            "kind": row["kind"],
            "count": row["count"],
            "kernel": row["kernel"],
            "runs": {int(tokens): choice["kernel"] for tokens, choice in row["choices"].items()},
            "quantiser": row["quantiser"],
        }
        for row in rows
    }


def report_of(engine, path):
    """The rows that an engine writes once its model is loaded; what it would do then is not waited for."""
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            ended = engine.poll() is not None
            if path.exists() and path.read_text().endswith("}\n"):
                return json.loads(path.read_text())["models"][0]["rows"]
            if ended:
                return None
            time.sleep(0.5)
        return None
    finally:
        engine.kill()
        engine.wait()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Model -> (rows that explain predicts, rows of the engine), all engines at once."""
    folder = tmp_path_factory.mktemp("live")
    capability = torch.cuda.get_device_capability()
    if capability not in GPUS:
        pytest.skip(f"explain knows no GPU of compute capability {capability}")
    paths = {name: write_model(name, folder, layers) for name, layers in MODELS.items()}
    engines = {}
    for name, path in paths.items():
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("VLLM_")},
            "VLLM_B200_REPORT": str(folder / f"{name}.json"),
            "VLLM_B200_STRICT": "1",
            "VLLM_CACHE_ROOT": str(folder / "cache"),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        log = (folder / f"{name}.log").open("w")
        command = [sys.executable, "-c", ENGINE, str(path)]
        engines[name] = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    asked = f"{capability[0]}.{capability[1]}"
    tables = explain.explain([explain.Job(name, str(path), asked) for name, path in paths.items()])
    result = {}
    for table in tables:
        name = table["job"]["name"]
        live = report_of(engines[name], folder / f"{name}.json")
        result[name] = table, live, Path(folder / f"{name}.log").read_text()[-3000:]
    return result


@pytest.mark.timeout(500)
@pytest.mark.parametrize("name", MODELS)
def test_explain_predicts_what_the_engine_has(both, name):
    predicted, live, log = both[name]
    assert "error" not in predicted, predicted
    assert live is not None, log
    assert summary(predicted["rows"]) == summary(live)
    assert predicted["rows"], "there are layers"
