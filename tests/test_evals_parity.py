"""evals.parity: right and wrong models behind servers, several models, bad input."""

import json
import math
import os
import random
import subprocess
import sys
import zlib
from pathlib import Path

import fake_completions
import pytest

from evals import parity, scores
from evals.divergence import Difference, Position
from evals.processes import SideFailed
from evals.scores import Row, Scores
from vllm_b200_plugin.environment import CannotRun

ROOT = Path(__file__).parents[1]
VOCABULARY = 40


def measure(*arguments: object, **env: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "evals.parity", *map(str, arguments)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_B200_")}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env={**clean, **env})


def made_up_model(noise: float, fault: float = 0.0, seed: int = 0):
    """/tokenize and /v1/completions: logits by the last two tokens, with noise that is new in every request.

    fault: what is added to the logit of every fourth token.
    """
    rng = random.Random(seed)

    def distribution(context: list[int]) -> list[float]:
        own = random.Random(zlib.crc32(bytes(context[-2:])))
        logits = [own.gauss(0, 2) + rng.gauss(0, noise) + (fault if t % 4 == 0 else 0) for t in range(VOCABULARY)]
        total = math.log(sum(map(math.exp, logits)))
        return [logit - total for logit in logits]

    def complete(body):
        ids, entries = body["prompt"], [None]
        for i in range(1, len(ids)):
            logprobs = distribution(ids[:i])
            ranked = sorted(range(VOCABULARY), key=lambda t: -logprobs[t])
            kept = dict.fromkeys([ids[i], *ranked[: body["prompt_logprobs"]]])
            entries.append({str(t): {"logprob": logprobs[t], "rank": ranked.index(t) + 1} for t in kept})
        return {"choices": [{"prompt_logprobs": entries}]}

    return {
        "/tokenize": lambda body: {"tokens": [ord(letter) % VOCABULARY for letter in body["prompt"]]},
        "/v1/completions": complete,
    }


def across(tmp_path: Path, stock, plugin, *more: object) -> "subprocess.CompletedProcess[str]":
    with fake_completions.serving(stock) as one, fake_completions.serving(plugin) as two:
        arguments = ("--num-texts", 12, "--tokens", 80, "--top", 10, "--out", tmp_path / "out", *more)
        return measure("made-up", "--urls", one.url, two.url, *arguments)


def test_the_same_model_is_within_the_noise(tmp_path):
    done = across(tmp_path, made_up_model(0.05, seed=1), made_up_model(0.05, seed=2))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "same: within 4 times the noise floor" in done.stdout
    result = json.loads((tmp_path / "out" / "made-up" / "result.json").read_text())
    assert [row["composition"] for row in result["rows"]] == ["together", "alone", "short"]
    assert [row["difference"]["positions"] for row in result["rows"]] == [
        12 * 79,
        12 * 79,
        2 * (1 + 3 + 7 + 15 + 31 + 63),
    ]
    for row in result["rows"]:
        # two noisy copies of the same logits: KL = noise^2 (1 - sum p^2), on average and whole
        assert 0 < row["difference"]["mean_kl"] < 0.05**2
        assert 0.5 < row["ratio"] < 2


def test_a_wrong_model_is_not(tmp_path):
    done = across(tmp_path, made_up_model(0.05, seed=1), made_up_model(0.05, fault=0.5, seed=2))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "DIFFERENT: more than 4 times the noise floor with the texts together, alone, short" in done.stdout


def test_servers_that_cannot(tmp_path):
    done = across(tmp_path, {}, {})
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "did not score the texts: HTTP Error 404" in line
    done = measure("m", "--urls", "http://127.0.0.1:9", "http://127.0.0.1:9", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no server answers at http://127.0.0.1:9")


def difference(mean: float, p99: float) -> Difference:
    return Difference(positions=10, mean_kl=mean, p99_kl=p99, top1=1, largest=0, where=0)


def test_ratio():
    floor = difference(1e-3, 1e-2)
    assert Row("alone", difference(2e-3, 5e-2), floor).ratio(1e-5) == pytest.approx(5)
    assert Row("alone", difference(6e-3, 5e-2), floor).ratio(1e-5) == pytest.approx(6)
    assert Row("alone", difference(0, 0), difference(0, 0)).ratio(1e-5) == 0
    assert Row("alone", difference(3e-5, 0), difference(0, 0)).ratio(1e-5) == pytest.approx(3)


def made_up_scores(texts, level=0.5) -> Scores:
    positions = [[Position(token, {token: math.log(level)}) for token in ids[1:]] for ids in texts]
    return Scores(texts, dict.fromkeys(scores.OTHER_BATCHES, positions))


def test_sides_that_tokenize_differently():
    with pytest.raises(SideFailed, match="tokenize the texts differently"):
        scores.compare(made_up_scores([[1, 2]]), made_up_scores([[1, 3]]), 1)
    with pytest.raises(SideFailed, match="no text has two tokens"):
        scores.compare(made_up_scores([[1]]), made_up_scores([[1]]), 1)
    side = made_up_scores([[1, 2, 3], [4]])
    assert [row.difference.positions for row in scores.compare(side, side, 1)] == [2, 2, 2]
    assert scores.own_noise(side, 1).positions == 2


def test_a_token_without_an_answer():
    content = {"texts": [[1, 2]], "answers": {name: [[None]] for name in scores.OTHER_BATCHES}}
    with pytest.raises(SideFailed, match="text of 2 tokens came back with 1 log-probabilities"):
        scores.read(content)


def test_texts(tmp_path):
    made = parity.read_texts(None, 3)
    assert len(made) == 3 and all(len(text) > 1500 and "####" in text for text in made)
    assert made == parity.read_texts(None, 3)
    file = tmp_path / "texts"
    with pytest.raises(CannotRun, match="cannot be read"):
        parity.read_texts(file, 3)
    file.write_text("\n\n")
    with pytest.raises(CannotRun, match="holds no text"):
        parity.read_texts(file, 3)
    file.write_text("a\n\nb\nc\nd\n")
    assert parity.read_texts(file, 3) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["m", "--tokens", "1"], "--tokens takes a whole number from 2 on"),
        (["m", "--multiple", "0"], "take numbers above 0"),
        (["m", "--urls", "a", "b", "--baseline", "x"], "--urls names servers that are running"),
        (["m", "n", "--urls", "a", "b"], "--urls takes one model"),
        (["x/m", "y/m"], "take different names"),
    ],
)
def test_bad_options(arguments, expected, capsys):
    with pytest.raises(SystemExit) as stopped:
        parity.parse(arguments)
    assert stopped.value.code == 2
    assert expected in capsys.readouterr().err


def test_format_of_a_model(tmp_path):
    assert parity.quantisation("some/model") == "format not known here"
    for config, expected in (
        ({}, "not quantised"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "compressed-tensors float-quantized"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt NVFP4"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config} if config else {}))
        assert parity.quantisation(str(tmp_path)) == expected


def test_several_models_end_in_one_table(tmp_path, monkeypatch, capsys):
    """One is the same, one is not, one cannot be run; the rest of them go on."""
    floor = difference(1e-3, 1e-2)
    rows = {"same": difference(1e-3, 1e-2), "other": difference(1e-1, 1e-2)}

    def run_model(model, options, texts):
        if model == "broken":
            raise SideFailed("stock vLLM failed.")
        return parity.Outcome(model, "fp8", [Row("alone", rows[model], floor), Row("short", floor, floor)])

    monkeypatch.setattr(parity, "run_model", run_model)
    assert parity.main(["same", "other", "broken"]) == 1
    output = capsys.readouterr()
    table = output.out.splitlines()[-4:]
    assert [line.split()[0] for line in table] == ["model", "same", "other", "broken"]
    assert table[1].split()[2:4] == ["alone", "1.00e-03"] and table[1].endswith("  1")
    assert table[2].endswith("  100 DIFFERENT")
    assert table[3].endswith("stock vLLM failed.")
    assert "error: broken: stock vLLM failed." in output.err
    assert parity.main(["same", "broken"]) == 2
    assert parity.main(["same"]) == 0
