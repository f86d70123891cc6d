"""The small model in every format that a CPU serves, with the plugin's references against bf16; and the records."""

import gzip
import json
import re

import pytest

from evals import all_formats, processes, scores, sides
from evals.all_formats import CHECKPOINTS
from evals.divergence import Difference
from evals.processes import SideFailed
from evals.scores import Row
from vllm_b200_plugin.environment import cpu_has_amx

FORMATS = ("bf16", "ct_fp8_block", "ct_int8", "ct_nvfp4", "fp8_block", "fp8_tensor", "modelopt_nvfp4")
QUESTIONS = 100
POINTS = 0.02
# KL from bf16 that quantising alone costs, in nats, mean or 99th percentile: the noise floor is this at least.
QUANTISING = {"int8": 1e-3, "fp8": 1e-3, "nvfp4": 1e-2}
# What vLLM says where neither it nor the plugin has a kernel for a CPU.
NO_KERNEL = {
    "fp8_tensor": "static_scaled_fp8_quant",
    **({} if cpu_has_amx() else {"ct_int8": "MoE|experts"}),
}


@pytest.fixture(scope="module")
def records(tmp_path_factory, preloaded):
    """Of one run over all formats, by format."""
    folder = tmp_path_factory.mktemp("formats")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "Worker", preloaded)
        arguments = ["--reference-only", "--questions", QUESTIONS, "--fewshot", 1, "--num-texts", 8, "--tokens", 96]
        arguments += ["--jobs", 1, "--work", folder / "work", "--out", folder / "out"]
        engine = ["--", "--enforce-eager", "--max-model-len", "768", "--max-num-seqs", "128"]
        all_formats.main([*map(str, arguments), *engine])
    print((folder / "out" / "summary.md").read_text())
    with gzip.open(folder / "out" / "answers.jsonl.gz", "rt") as file:
        answers = [json.loads(line) for line in file]
    lines = [json.loads(line) for line in (folder / "out" / "records.jsonl").read_text().splitlines()]
    assert {"torch", "vllm", "commit", "command"} <= lines[0]["env"].keys()
    assert {answer["format"] for answer in answers} == {
        line["format"] for line in lines[1:] if line["accuracy"].get("plugin")
    }
    return {line["format"]: line for line in lines[1:]}


@pytest.mark.serve
@pytest.mark.parametrize("name", FORMATS)
def test_format_against_bf16(records, name):
    record = records[name]
    if problem := record["failed"].get("plugin"):
        assert re.search(NO_KERNEL.get(name, "$^"), problem), problem
        pytest.skip(f"no kernel for a CPU: {problem}")
    assert record["accuracy"]["baseline"]["strict-match"] >= 0.8
    for share in ("strict-match", "flexible-extract"):
        assert abs(record["accuracy"]["plugin"][share] - record["accuracy"]["baseline"][share]) <= POINTS, record
    least = next((kl for kind, kl in QUANTISING.items() if kind in name), 1e-5)
    for row in record["parity"]:
        known = Row(row["composition"], Difference(**row["difference"]), Difference(**row["floor"]))
        assert known.ratio(least) <= 4, row


def test_every_format_is_there():
    assert [path.parent.name for path in sorted(CHECKPOINTS.glob("*/config.json"))] == sorted(FORMATS)


# -- without an engine


def made_up_engine(wrong: int, shift: float, task: processes.Task) -> None:
    """What both_worker writes: the first `wrong` answers wrong, log-probabilities off by about `shift`."""
    samples = [
        {"id": i, "filter": name, "answer": "a", "extracted": "1", "right": i >= wrong}
        for i in range(task.request["limit"])
        for name in ("strict-match", "flexible-extract")
    ]
    share = 1 - wrong / task.request["limit"]
    results = {f"exact_match,{name}": share for name in ("strict-match", "flexible-extract")}
    features = None if "VLLM_PLUGINS" in task.env else {}
    content = {"features": features, "results": results, "samples": samples, "questions": len(samples) // 2}
    (task.folder / "results.json").write_text(json.dumps(content))
    entry = [None, {"1": -0.7 - shift, "2": -0.7 + shift}]
    scored = {"texts": [[0, 1]], "answers": {name: [entry] for name in scores.OTHER_BATCHES}}
    (task.folder / "logprobs.json").write_text(json.dumps(scored))
    (task.folder / "log").write_text("INFO [b200] FP8 block linear -> Kernel: reason\n")


@pytest.fixture
def engines(tmp_path, monkeypatch):
    """run(behaviour, options) -> exit code; run.ran: its tasks. behaviour: "format/side" -> (wrong, shift) or error."""
    for name in ("bf16", "fp8", "int8"):
        (tmp_path / "models" / name).mkdir(parents=True)
        quantised = {} if name == "bf16" else {"quantization_config": {"quant_method": name}}
        (tmp_path / "models" / name / "config.json").write_text(json.dumps(quantised))
        (tmp_path / "models" / name / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(sides, "check_installed", lambda: {"vllm": "0.32.0", "plugin": "1"})
    monkeypatch.setattr(all_formats.environment, "module_exists", lambda name: True)

    def run(behaviour, *options):
        def run_all(tasks, jobs, label, limit, ended):
            failed = {}
            for index, task in enumerate(tasks):
                name = "/".join(task.folder.parts[-2:])
                run.ran.append(name)
                does = behaviour.get(name, (0, 0))
                if isinstance(does, str):
                    failed[index] = SideFailed(f"{task.label} failed: {does} (see log).", does)
                else:
                    made_up_engine(*does, task)
                ended(failed)
                run.written.append(read(run.out)[1])
            return failed

        run.ran, run.written = [], []
        monkeypatch.setattr(processes, "run_all", run_all)
        arguments = [tmp_path / "models", "--questions", 20, "--work", tmp_path / "work", "--out", tmp_path / "out"]
        return all_formats.main([*map(str, arguments), *map(str, options)])

    run.out = tmp_path / "out"
    return run


def read(out):
    lines = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    return lines[0], {line["format"]: line for line in lines[1:]}


def test_records_of_all_formats(engines, capsys):
    no_kernel = "ValueError: no INT8 kernel"
    code = engines({"int8/baseline": no_kernel, "int8/plugin": no_kernel, "fp8/plugin": (1, 0)})
    assert code == 0, capsys.readouterr()
    assert sorted(engines.ran) == [
        f"{name}/{side}" for name in ("bf16", "fp8", "int8") for side in ("baseline", "plugin")
    ]
    assert engines.written[1]["bf16"]["verdict"] == "same", "on disk as soon as it is known"
    assert engines.written[1]["fp8"]["failed"] == dict.fromkeys(("baseline", "plugin"), "had not ended by then")
    head, records = read(engines.out)
    assert head["settings"]["questions"] == 20 and head["env"]["vllm"] == "0.32.0"
    assert list(records) == ["bf16", "fp8", "int8"]
    fp8 = records["fp8"]
    assert fp8["quantisation"] == "fp8" and fp8["verdict"] == "same"
    assert fp8["accuracy"]["plugin"]["strict-match"] == 0.95 and fp8["gsm8k"]["strict-match"]["lost"] == 1
    assert fp8["kernels"]["plugin"]["plugin"] == ["[b200] FP8 block linear -> Kernel: reason"]
    assert records["int8"]["failed"] == {"baseline": no_kernel, "plugin": no_kernel}
    table = (engines.out / "summary.md").read_text()
    assert "| fp8 | 1.000 | 0.950 | 1 | 0 | 0.5 | -0.050 |" in table
    assert f"int8, stock: {no_kernel}" in table
    with gzip.open(engines.out / "answers.jsonl.gz", "rt") as file:
        assert len(list(file)) == 4 * 20
    # only what failed runs again
    assert engines({}) == 0
    assert sorted(engines.ran) == ["int8/baseline", "int8/plugin"]


@pytest.mark.parametrize(
    "behaviour, verdict",
    [
        ({"fp8/plugin": (9, 0)}, "worse by strict-match, worse by flexible-extract"),
        ({"fp8/plugin": (0, 0.5)}, "beyond 4 times the floor"),
        ({"fp8/plugin": "ValueError: no"}, "the plugin did not run"),
    ],
)
def test_a_worse_format_decides(engines, behaviour, verdict):
    assert engines(behaviour) == 1
    assert {name: record["verdict"] for name, record in read(engines.out)[1].items()} == {
        "bf16": "same",
        "fp8": verdict,
        "int8": "same",
    }


def test_everything_against_the_reference(engines):
    assert engines({"int8/plugin": "ValueError: no"}, "--reference-only", "--only", "fp8", "int8") == 0
    assert engines.ran == ["bf16/baseline", "bf16/plugin", "fp8/plugin", "int8/plugin"]
    records = read(engines.out)[1]
    assert [records[name]["verdict"] for name in ("bf16", "fp8", "int8")] == ["same", "same", "-"]
    assert "| format | stock bf16 | plugin |" in (engines.out / "summary.md").read_text()


@pytest.mark.parametrize(
    "options, problem",
    [
        (["--only", "nvfp4"], "has no nvfp4, it has bf16, fp8, int8."),
        (["--reference", "fp16"], "has no fp16, it has"),
        (["--data", "/no/such/folder"], "/no/such/folder does not exist."),
    ],
)
def test_bad_input_is_one_sentence(engines, options, problem, capsys):
    assert engines({}, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and problem in error and error.count("\n") == 1


def test_a_folder_without_models(tmp_path, capsys):
    assert all_formats.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "there is no model in" in capsys.readouterr().err


def test_no_plugin_at_all(engines, capsys):
    broken = {f"{name}/plugin": "ImportError: x" for name in ("bf16", "fp8", "int8")}
    assert engines(broken) == 2
    assert "error: no engine with the plugin ran: bf16 the plugin failed: ImportError: x" in capsys.readouterr().err
