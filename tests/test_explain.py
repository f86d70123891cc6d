"""vllm-b200 explain but for building models, which tests/golden_tables.py does."""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import types

import pytest
import torch

from vllm_b200_plugin import cli, explain, plugin, vllm_compat
from vllm_b200_plugin.dispatch import Choice
from vllm_b200_plugin.environment import CannotRun
from vllm_b200_plugin.explain import child, costs, page, record, render, stubs
from vllm_b200_plugin.explain.gpus import GPUS, gpu
from vllm_b200_plugin.integration import layer_table, report, startup_report, vllm_branches
from vllm_b200_plugin.model_shapes import MODEL_SHAPES


def row(**changes):
    choices = {"1": {"kernel": "few", "reason": "1 token"}, "16": {"kernel": "many", "reason": "16 tokens"}}
    return {
        "kind": "linear",
        "name": "model.layers.*.mlp.down_proj",
        "shape": "N=2048 K=768",
        "weights": "float8_e4m3fn (Fp8LinearMethod)",
        "kernel": "Ours",
        "choices": {**choices, "256": choices["16"], "8192": choices["16"]},
        "quantiser": "vllm_b200::per_token_group_quant",
        "weight_bytes": 4_800_000,
        "experts": None,
        "cache_bytes": 0,
        "window": None,
        "passed_over": {"Other <A>": "needs K % 128 == 0", "Another": "needs K % 128 == 0"},
        "count": 48,
        **changes,
    }


def table(rows, stock=(), **changes):
    job = {"name": "a-model", "model": "/m", "capability": "9.0", "tp": 1, "ep": False, "stock": False}
    return {"job": job, "vllm": "0.33.0", "rows": rows, "stock": list(stock), "overridden_ops": ["_C::op"], **changes}


# --- what is asked for


def refused(capsys, *arguments):
    assert cli.main(["explain", *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("vllm-b200: ") and message.count("\n") == 1
    return message


def test_a_model_that_is_none(capsys, tmp_path):
    assert "neither a folder, a config.json nor one of qwen3-30b" in refused(capsys, "no-such-model")
    assert "has no config.json" in refused(capsys, str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert "is not JSON" in refused(capsys, str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert "names no architectures" in refused(capsys, str(tmp_path))


def test_gpus_and_ranks_that_are_none(capsys):
    assert "--capability 8.6 is not one of 9.0 (NVIDIA H200), 10.0" in refused(
        capsys, "llama-3.1-8b-fp8", "--capability", "9.0", "8.6"
    )
    assert "--tp takes a number of ranks from 1 on" in refused(capsys, "llama-3.1-8b-fp8", "--tp", "0")
    assert "--ep spreads experts over ranks" in refused(capsys, "llama-3.1-8b-fp8", "--ep")


def test_without_vllm_and_with_its_cpu_build(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("vllm_b200_plugin.environment.module_exists", lambda name: name != "vllm")
    assert "vLLM is not installed" in refused(capsys, "llama-3.1-8b-fp8")
    monkeypatch.setattr("vllm_b200_plugin.environment.check_vllm", lambda: ("0.32.0", None))
    monkeypatch.setattr("vllm_b200_plugin.environment.module_folder", lambda *parts: tmp_path)
    assert "the installed one is for another device" in refused(capsys, "llama-3.1-8b-fp8")


def test_where_a_configuration_comes_from(tmp_path):
    name, folder = explain.model_folder("qwen3-30b-a3b-fp8", tmp_path / "scratch")
    assert name == "qwen3-30b-a3b-fp8"
    assert json.loads((folder / "config.json").read_text()) == MODEL_SHAPES["qwen3-30b-a3b-fp8"]
    assert explain.model_folder(str(folder), tmp_path / "other") == ("qwen3-30b-a3b-fp8", folder)
    alone = tmp_path / "my-config.json"
    shutil.copy(folder / "config.json", alone)
    name, copied = explain.model_folder(str(alone), tmp_path / "other")
    assert (name, copied) == ("my-config", tmp_path / "other" / "my-config")


def test_errors_of_vllm_in_a_line():
    unknown = (
        "1 validation error for ModelConfig\n  Value error, Model architectures ['No'] are not supported for now. "
        "Supported architectures: dict_keys(['A']) [type=value_error, input_value=...]\n    For further information"
    )
    assert child._in_words(ValueError(unknown)) == "Model architectures ['No'] are not supported for now."
    assert child._in_words(RuntimeError("a\n b")) == "RuntimeError: a b"


# --- stand-ins for libraries


def test_stand_ins_are_compiled_once_and_load(tmp_path):
    folder = stubs._compiled(list(stubs._SOURCES), tmp_path)
    made = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert set(made) == {"libcuda.so.1", "libtorch_cuda.so", "libc10_cuda.so"}
    assert ctypes.CDLL(str(folder / "libcuda.so.1")).cuInit(0) == 100
    assert stubs._compiled(list(stubs._SOURCES), tmp_path) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == made
    assert len(list(tmp_path.iterdir())) == 1


def test_a_missing_compiler_or_runtime_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(stubs, "_cuda_runtime", lambda: None)
    with pytest.raises(CannotRun, match=r"libcudart\.so\.13"):
        stubs.library_path(tmp_path)
    monkeypatch.setattr(stubs, "_cuda_runtime", lambda: tmp_path)
    monkeypatch.setattr(stubs, "_exists", lambda name: False)
    monkeypatch.setattr(stubs.shutil, "which", lambda name: None)
    with pytest.raises(CannotRun, match="needs a C compiler"):
        stubs.library_path(tmp_path / "none yet")


# --- arithmetic


def test_bytes_launches_and_floor():
    linear = costs.cost(row(), gpu("9.0"))
    assert (linear.bytes, linear.launches, round(linear.floor_us, 3)) == (4_800_000, 2, 1.0)
    plain = row(quantiser="", weight_bytes=100)
    assert costs.cost(plain, gpu("9.0")).launches == 1
    ours = {"choices": {"1": {"kernel": "small_m_gemm", "reason": ""}}}
    for kernel, launches in (("B200DeepGemmFp8BlockKernel", 1), ("B200CutlassFp8Kernel", 2)):
        assert costs.cost(row(kernel=kernel, **ours), gpu("9.0")).launches == launches
    attention = row(kind="attention", cache_bytes=1024, quantiser="_C_cache_ops::reshape_and_cache_flash")
    assert costs.cost(attention, gpu("10.0"), num_tokens=2, context=1000).bytes == 2 * 1000 * 1024
    assert costs.cost({**attention, "window": 128}, gpu("10.0"), context=1000).bytes == 128 * 1024
    embedding = row(kind="embedding", shape="N=100 K=8", weight_bytes=1600)
    assert costs.cost(embedding, gpu("9.0"), num_tokens=3).bytes == 48
    total = costs.total([row(), plain], gpu("9.0"))
    assert (total.bytes, total.launches) == (48 * 4_800_100, 48 * 3)


@pytest.mark.parametrize("tokens, share", [(1, 8 / 128), (16, 1 - (120 / 128) ** 16)])
def test_experts_that_tokens_reach(tokens, share):
    experts = row(kind="experts", experts=(128, 128, 8), weight_bytes=1_000_000)
    assert costs.cost(experts, gpu("9.0"), tokens).bytes == int(1_000_000 * share)
    assert costs.cost(experts, gpu("9.0"), tokens).launches is None
    triton = {"1": {"kernel": "TritonExperts", "reason": ""}}
    assert costs.cost({**experts, "choices": triton}, gpu("9.0")).launches == 8
    assert costs.cost({**experts, "choices": triton, "quantiser": ""}, gpu("9.0")).launches == 6


def test_published_gpus():
    assert gpu("10.3") is GPUS[(10, 3)]
    assert all(g.bandwidth > 1e12 and g.memory > 9e10 and g.sms > 100 for g in GPUS.values())


# --- what is drawn


def test_text_says_what_runs_why_and_what_stock_does():
    stock = row(kernel="Theirs", quantiser="_C::per_token_group_fp8_quant")
    same = row(name="lm_head", kernel="F.linear", quantiser="", passed_over={}, count=1)
    text = render.text([table([row(), same], [stock, same])])
    assert "a-model on NVIDIA H200 (9.0), vLLM 0.33.0, with the plugin" in text
    assert "  *     48  linear     mlp.down_proj" in text
    assert "Ours: 1: few, 16 to 8192: many" in text
    assert "        1  linear     lm_head" in text
    assert "    1           few: 1 token\n    16 to 8192  many: 16 tokens\n" in text
    assert "    stock       Theirs: 1: few, 16 to 8192: many; _C::per_token_group_fp8_quant" in text
    assert "    not         Other <A>, Another: needs K % 128 == 0" in text
    assert "Arithmetic, not measurement" in text
    assert "ops of vLLM that run our kernel: _C::op" in text
    assert "not         Other" not in render.text([table([row()])], details=False)


def test_layers_of_which_the_same_is_said_are_said_together():
    text = render.text([table([row(), row(name="model.layers.*.mlp.up_proj")])])
    assert (
        "  48 x model.layers.*.mlp.down_proj: N=2048 K=768\n  48 x model.layers.*.mlp.up_proj: N=2048 K=768\n" in text
    )
    assert text.count("    kernel      Ours") == 1


def test_stock_is_paired_and_notes_are_kept():
    with_plugin, stock = table([row()]), table([row(kernel="Theirs")])
    stock["job"] = {**stock["job"], "stock": True}
    with_plugin |= {"assumption": "built for 90a", "quantised": None, "features": {"a": "applied", "b": "no reason"}}
    (paired,) = explain.pair([with_plugin, stock])
    assert paired["stock"][0]["kernel"] == "Theirs"
    assert paired["notes"] == [
        "built for 90a",
        "the configuration names no quantisation, so the weights are taken as they come",
        "b is off: no reason",
    ]
    assert explain.pair([stock]) == [stock]
    (failed,) = explain.pair([with_plugin, {"job": stock["job"], "error": "no memory"}])
    assert failed["error"] == "stock vLLM: no memory"


def test_page_is_drawn_by_a_browser(tmp_path):
    text = page.html([table([row(), row(kernel="<script>")], [row(kernel="Theirs")], notes=["a & b"])])
    assert "&lt;script&gt;" in text and "a &amp; b" in text and "class=changed" in text
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium")
    (tmp_path / "page.html").write_text(text)
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", str(tmp_path / "page.html")]
    drawn = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert drawn.count("<tr") == 4 and "2 passed over" in drawn


# --- what a built model says


class Layer(torch.nn.Module):
    def __init__(self, n=64, k=128):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(n, k, dtype=torch.bfloat16, device="meta"))
        self.input_size, self.output_size = k, 2 * n
        self.input_size_per_partition, self.output_size_per_partition = k, n
        self.quant_method = types.SimpleNamespace()


def model():
    net = torch.nn.Module()
    net.layers = torch.nn.ModuleList(torch.nn.ModuleDict({"proj": Layer()}) for _ in range(3))
    net.head = Layer(8)
    return net


def test_rows_of_a_model(monkeypatch):
    net = model()
    few_tokens = Choice("ours", "few tokens")
    ours = {"feature": lambda layer, tokens: few_tokens if layer is net.head and tokens <= 16 else None}
    monkeypatch.setattr(report, "choices", ours)
    first, head = layer_table.rows(net, {id(net.head): {"Other": "no"}})
    assert (first.name, first.count, first.shape, first.weight_bytes) == ("layers.*.proj", 3, "N=64 K=128", 16384)
    assert {choice.kernel for choice in first.choices.values()} == {"F.linear"}
    assert [choice.kernel for choice in head.choices.values()] == ["ours", "ours", "F.linear", "F.linear"]
    assert head.passed_over == {"Other": "no"}


def test_a_feature_answers_for_its_layers_once_it_is_applied(monkeypatch):
    monkeypatch.setattr(report, "choices", {})
    monkeypatch.setattr(plugin, "_results", {})
    module = types.SimpleNamespace(apply=lambda: None, choice=lambda layer, tokens: None)
    import_module = plugin.importlib.import_module
    monkeypatch.setattr(
        plugin.importlib, "import_module", lambda name: module if name == "made_up" else import_module(name)
    )
    plugin._apply(plugin.Feature("f", "changes", "needs", "made_up", "after"))
    assert report.choices == {"f": module.choice}


def test_what_is_noted_belongs_to_the_layer_under_construction(monkeypatch):
    monkeypatch.setattr(record, "passed_over", {})

    class Asks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.ask()

        def ask(self):
            record._note("Kernel", "needs\n  more.")
            record._note("Kernel", "needs less")

    layer = Asks()
    assert record.passed_over == {id(layer): {"Kernel": "needs less"}}


GATE = {
    "allow_ll_bf16_gemm": False,
    "allow_fp32_router_gemm": False,
    "allow_ll_fp32w_gemm": False,
    "allow_bf16x3_router_gemm": False,
    "allow_cublas_router_gemm": True,
    "LL_BF16_MAX_TOKENS": 16,
}


@pytest.mark.parametrize(
    "flags, runs",
    [
        ({}, {1: "torch.mm to fp32", 8192: "torch.mm to fp32"}),
        ({"allow_ll_bf16_gemm": True}, {16: "CuteDSL ll_bf16_gemm", 17: "torch.mm to fp32"}),
        (
            {"allow_ll_fp32w_gemm": True, "allow_bf16x3_router_gemm": True},
            {32: "CuteDSL ll_fp32w_gemm", 33: "CuteDSL bf16x3"},
        ),
        ({"allow_cublas_router_gemm": False}, {1: "F.linear"}),
    ],
)  # fmt: skip
def test_tiers_of_vllms_gate(flags, runs):
    gate = types.SimpleNamespace(**{**GATE, **flags})
    assert {tokens: vllm_branches.choice(gate, "F.linear", tokens).kernel for tokens in runs} == runs


def test_vllms_branches_by_kernel():
    fused = types.SimpleNamespace(_use_min_latency_gemm=True)
    assert vllm_branches.choice(fused, "F.linear", 16).kernel == "_C::dsv3_fused_a_gemm"
    assert vllm_branches.choice(fused, "F.linear", 17).kernel == "F.linear"
    hopper = "FlashInferFp8DeepGEMMDynamicBlockScaledKernel"
    assert [vllm_branches.choice(object(), hopper, n).kernel for n in (31, 32)] == ["FlashInfer swap-AB", "DeepGEMM"]
    assert vllm_branches.choice(object(), "CutlassFp8BlockScaledMMKernel", 1) is None


def test_report_of_a_loaded_model(monkeypatch, tmp_path, caplog):
    class Loader:
        def load_model(self, vllm_config):
            return model()

    monkeypatch.setattr(vllm_compat.Private, "get", lambda entry: Loader)
    monkeypatch.setattr(vllm_compat, "capability", lambda: (9, 0))
    monkeypatch.setattr(startup_report, "_models", [])
    monkeypatch.setenv("VLLM_B200_REPORT", str(tmp_path / "report.json"))
    startup_report.apply()
    startup_report.apply()
    with caplog.at_level("INFO", logger="vllm.b200"):
        Loader().load_model(None)
    assert [record.getMessage() for record in caplog.records] == [
        "[b200] 3 x layers.*.proj N=64 K=128: F.linear",
        "[b200] 1 x head N=8 K=128: F.linear",
    ]
    (loaded,) = json.loads((tmp_path / "report.json").read_text())["models"]
    assert loaded["capability"] == [9, 0]
    assert [found["count"] for found in loaded["rows"]] == [3, 1]


def test_a_report_that_fails_does_not_stop_the_engine(monkeypatch, caplog):
    loader = types.SimpleNamespace(load_model=lambda self, config: "a model")
    monkeypatch.setattr(vllm_compat.Private, "get", lambda entry: loader)
    startup_report.apply()
    assert loader.load_model(None, None) == "a model"
    assert "[b200] no table of kernels: AttributeError" in caplog.text
    monkeypatch.setenv("VLLM_B200_STRICT", "1")
    with pytest.raises(AttributeError):
        loader.load_model(None, None)


def test_line_of_the_report():
    few, many = Choice("few", "1 token"), Choice("many", "more")
    kind = layer_table.Row("linear", "proj", "N=1 K=2", "bf16", "Ours", {1: few, 16: few, 256: many}, "quant", count=2)
    assert startup_report.line(kind) == "2 x proj N=1 K=2: Ours (1: few, 256: many), quant"


def test_a_build_that_dies_is_tried_once_more(tmp_path):
    def dies(times):
        tried = tmp_path / f"tried {times}"

        def task():
            with tried.open("a") as file:
                file.write("x")
            if len(tried.read_text()) <= times:
                os.kill(os.getpid(), signal.SIGKILL)
            return {"rows": []}

        return task

    assert child._collect([dies(0), dies(1), dies(2)], 2) == [
        {"rows": []},
        {"rows": []},
        {"error": "the process that built the model died, exit code -9"},
    ]
