"""evals.gsm8k: lm-eval's own task against servers of known knowledge, resuming, bad input, and one real engine."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fake_completions
import preloaded_worker
import pytest

from evals import gsm8k, sides
from evals.small_math import generate
from vllm_b200_plugin.environment import CannotRun, module_exists

QUESTIONS = 30
needs_lm_eval = pytest.mark.skipif(not module_exists("lm_eval"), reason="lm-eval is not installed (extra evals)")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    generate.write(folder, seed=1, train=50, test=QUESTIONS, new_templates=10)
    return folder


def pupil(data: Path, wrong: int, sloppy: int = 0):
    """Answers /v1/completions: the last `wrong` questions wrong, the first `sloppy` ones without the ####."""
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    texts = {}
    for number, row in enumerate(rows):
        text = row["answer"]
        if number >= len(rows) - wrong:
            text += "7"
        if number < sloppy:
            text = "I think it is " + text.rpartition("#### ")[2] + "."
        texts[row["question"]] = " " + text

    def answer(body):
        question = body["prompt"].rpartition("Question: ")[2].removesuffix("\nAnswer:")
        assert body["prompt"].count("Question: ") == 6  # five worked examples
        return {"choices": [{"index": 0, "text": texts[question]}]}

    return {"/v1/completions": answer}


def evaluate(*arguments: object) -> "subprocess.CompletedProcess[str]":
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "evals.gsm8k", *map(str, arguments)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)


@needs_lm_eval
def test_a_worse_plugin_is_found_and_results_are_kept(data, tmp_path):
    with fake_completions.serving(pupil(data, wrong=1)) as stock, fake_completions.serving(pupil(data, 7, 3)) as plugin:
        command = ("made-up", "--urls", stock.url, plugin.url, "--data", data, "--out", tmp_path, "--chunk", 8)
        done = evaluate(*command)
        assert done.returncode == 1, done.stdout + done.stderr
        # strict-match: 6 more wrong and 3 without the form; flexible-extract reads those
        assert "strict-match: 9 answers lost, 0 gained, of 30" in done.stdout
        assert "flexible-extract: 6 answers lost, 0 gained, of 30" in done.stdout
        assert "worse 0.0156 (one-sided), changed 0.0312 (two-sided)" in done.stdout
        assert "WORSE: the plugin is significantly worse by strict-match and flexible-extract" in done.stdout
        assert f"0.9667 ± {(29 / 30 * (1 / 30) / 29) ** 0.5:.4f}" in done.stdout
        assert "30/30" in done.stderr
        assert stock.requests == plugin.requests == QUESTIONS

        result = json.loads((tmp_path / "result.json").read_text())
        assert result["comparison"]["strict-match"]["lost"] == 9
        own = result["sides"]["plugin"]["results"]["exact_match,strict-match"]
        assert own == pytest.approx(result["comparison"]["strict-match"]["plugin"]) == pytest.approx(20 / 30)
        stderr = result["sides"]["plugin"]["results"]["exact_match_stderr,strict-match"]
        assert stderr == pytest.approx(result["comparison"]["strict-match"]["plugin_stderr"])
        assert len(result["sides"]["baseline"]["samples"]) == 2 * QUESTIONS
        assert {"id", "answer", "extracted", "right", "target"} < result["sides"]["baseline"]["samples"][0].keys()

        again = evaluate(*command)
        assert again.returncode == 1 and again.stdout == done.stdout
        assert stock.requests == plugin.requests == QUESTIONS

        other = evaluate(*command, "--limit", 5)
        assert other.returncode == 2
        assert other.stderr.strip().endswith("another limit: name another --out, or replace them with --fresh.")


@needs_lm_eval
def test_a_wrong_task_is_one_sentence(data, tmp_path):
    with fake_completions.serving(pupil(data, 0)) as server:
        command = ("made-up", "--urls", server.url, server.url, "--data", data, "--out", tmp_path)
        done = evaluate(*command, "--task", "gsm8")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: lm-eval has no gsm8k task 'gsm8', it has gsm8k,")
    assert "Traceback" not in done.stderr


# -- going on after an interruption


@pytest.fixture
def worker(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(gsm8k.__file__).parent / "workers"))
    return importlib.import_module("lm_eval_worker")


def test_answers_are_not_asked_twice(worker, tmp_path):
    requests = [SimpleNamespace(args=(f"question {i % 9}", {"until": ["\n"]})) for i in range(10)]  # one comes twice
    asked, reported = [], []

    def answer(some, **kwargs):
        if len(asked) == 6:
            raise KeyboardInterrupt
        asked.extend(request.args[0] for request in some)
        return [f"answer to {request.args[0]}" for request in some]

    def status(**content):
        reported.append((content["done"], content["total"]))

    journal = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        worker.resumable(answer, journal, 3, status)(requests)
    with journal.open("a") as out:
        out.write('{"key": "cut')
    assert reported == [(1, 10), (4, 10), (7, 10)]
    asked.clear()
    texts = worker.resumable(answer, journal, 3, status)(requests)
    assert asked == ["question 6", "question 7", "question 8"]
    assert texts == [f"answer to {request.args[0]}" for request in requests]
    assert reported[-1] == (10, 10)
    asked.clear()
    assert worker.resumable(answer, journal, 3, status)(requests) == texts
    assert not asked


def test_settings_guard_a_folder(tmp_path):
    folder = tmp_path / "side"
    sides.claim(folder, {"limit": 5, "model": "a"}, fresh=False)
    (folder / "answers.jsonl").write_text("x")
    sides.claim(folder, {"limit": 5, "model": "a"}, fresh=False)
    with pytest.raises(CannotRun, match="holds results with another limit, model"):
        sides.claim(folder, {"limit": 6, "model": "b"}, fresh=False)
    sides.claim(folder, {"limit": 5, "model": "a"}, fresh=True)
    assert (folder / "answers.jsonl").exists()
    sides.claim(folder, {"limit": 6, "model": "a"}, fresh=True)
    assert not (folder / "answers.jsonl").exists()


# -- sides


def test_stock_is_every_plugin_but_ours(monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.delenv("VLLM_B200_DISABLE", raising=False)
    baseline, plugin = sides.both("stock")
    assert "b200" not in baseline.env["VLLM_PLUGINS"].split(",") and baseline.env["VLLM_PLUGINS"]
    assert not plugin.env
    baseline, _ = sides.both("group_quant_ops, fp8_block_linear")
    assert baseline.env == {"VLLM_B200_DISABLE": "group_quant_ops,fp8_block_linear"}
    with pytest.raises(CannotRun, match=r"--baseline takes stock or features .*; got nonsense\."):
        sides.both("nonsense")


def test_a_side_without_its_plugin_is_no_side():
    baseline, plugin = sides.both("stock")
    sides.check_features(baseline, None)
    sides.check_features(plugin, {"fp8_block_linear": "applied"})
    with pytest.raises(sides.SideFailed, match="did not load the plugin"):
        sides.check_features(plugin, None)
    with pytest.raises(sides.SideFailed, match="loaded the plugin"):
        sides.check_features(baseline, {})


# -- bad input


def test_bad_data(tmp_path):
    with pytest.raises(CannotRun, match="does not exist"):
        gsm8k.data_files(tmp_path / "none")
    with pytest.raises(CannotRun, match=r"no test\.jsonl"):
        gsm8k.data_files(tmp_path)
    (tmp_path / "test.jsonl").write_text('{"question": "1?", "answer": "#### 1"}\n')
    with pytest.raises(CannotRun, match=r"no train\.jsonl .*, for the worked examples"):
        gsm8k.data_files(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"question": "1?", "answer": "#### 1"}\n{"question": "1?"}\n')
    with pytest.raises(CannotRun, match=r"train\.jsonl, line 2 has no 'answer'"):
        gsm8k.data_files(tmp_path)
    (tmp_path / "train.jsonl").write_text("question,answer\n")
    with pytest.raises(CannotRun, match=r"train\.jsonl, line 1 is not JSON"):
        gsm8k.data_files(tmp_path)


def test_one_file_of_questions(data):
    files = gsm8k.data_files(data / "test_new_templates.jsonl")
    assert [Path(files[name]).name for name in ("train", "test")] == ["train.jsonl", "test_new_templates.jsonl"]
    assert gsm8k.data_files(None) is None


def test_a_server_that_is_not_up():
    with pytest.raises(CannotRun, match=r"no server answers at http://127\.0\.0\.1:9 \(.*refused.*\)"):
        sides.served_model("http://127.0.0.1:9", "m")
    with pytest.raises(CannotRun, match="no server answers at nonsense"):
        sides.served_model("nonsense", "m")
    with fake_completions.serving({}) as server:
        assert sides.served_model(server.url) == "made-up"
        with pytest.raises(CannotRun, match="does not serve other but made-up"):
            sides.served_model(server.url, "other")
    with fake_completions.serving({"/v1/models": lambda _: []}) as server, pytest.raises(CannotRun, match="no server"):
        sides.served_model(server.url)


def test_a_model_without_a_tokenizer(tmp_path):
    with pytest.raises(CannotRun, match="no folder"):
        sides.check_model(str(tmp_path / "none"), [])
    with pytest.raises(CannotRun, match=r"there is no config\.json"):
        sides.check_model(str(tmp_path), [])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CannotRun, match=r"has no tokenizer .*: name one with -- --tokenizer\."):
        sides.check_model(str(tmp_path), [])
    assert sides.check_model(str(tmp_path), ["--tokenizer", "x"]) == str(tmp_path)
    assert sides.check_model("deepseek-ai/DeepSeek-R1", []) == "deepseek-ai/DeepSeek-R1"


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["m", "--limit", "0"], "--limit takes a whole number from 1 on"),
        (["m", "--urls", "http://a", "http://b", "--serve"], "--urls names servers that are running"),
        (["m", "--urls", "http://a", "http://b", "--", "--seed", "1"], "--urls names servers that are running"),
    ],
)
def test_bad_options(arguments, expected, capsys):
    with pytest.raises(SystemExit) as stopped:
        gsm8k.parse(arguments)
    assert stopped.value.code == 2
    assert expected in capsys.readouterr().err


def test_what_follows_the_dashes_is_vllms():
    options = gsm8k.parse(["m", "--limit", "3", "--", "--enforce-eager", "--limit-mm-per-prompt", "{}"])
    assert options.limit == 3 and options.vllm == ["--enforce-eager", "--limit-mm-per-prompt", "{}"]


# -- a real engine


@pytest.mark.serve
@needs_lm_eval
def test_in_process_with_and_without_the_plugin(data, tmp_path, monkeypatch):
    pytest.importorskip("vllm")
    from vllm_b200_plugin.demo import checkpoint

    checkpoint.make(tmp_path / "model", "bf16")
    for name in [name for name in os.environ if name.startswith("VLLM_B200_")]:
        monkeypatch.delenv(name)
    for name, value in preloaded_worker.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    command = (tmp_path / "model", "--data", data, "--limit", 2, "--fewshot", 1, "--out", tmp_path / "out")
    done = evaluate(*command, "--", "--enforce-eager", "--max-num-seqs", 4)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "strict-match: 0 answers lost, 0 gained, of 2" in done.stdout
    logs = {name: (tmp_path / "out" / name / "log").read_text() for name in ("baseline", "plugin")}
    assert all("Qwen3MoeForCausalLM" in log for log in logs.values())
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    answers = [{entry["answer"] for entry in result["sides"][side]["samples"]} for side in ("baseline", "plugin")]
    assert result["sides"]["baseline"]["features"] is None
    assert result["sides"]["plugin"]["features"]["fp8_block_linear"]
    assert len(answers[0]) > 1
