"""The report on private names of vLLM: what it says when one is gone, moved or changed, and of the installed vLLM."""

import importlib.util
import json
from pathlib import Path

import compat
import pytest

from vllm_b200_plugin import vllm_compat

BEFORE = {
    "vllm/kernels/__init__.py": "from .base import Base, helper\nfrom .base import LIST\n",
    "vllm/kernels/base.py": (
        "from typing import Any\nclass Root:\n    def run(self, x): ...\n    def _own(self): ...\n"
        "class Base(Root):\n    @classmethod\n    def supported(cls) -> bool: ...\n"
        "def helper(a, *, b: int = 1) -> Any: ...\ntry:\n    LIST: dict[str, int] = {}\nexcept ImportError:\n    pass\n"
    ),
    "vllm/envs.py": "",
}


def entry(module: str, attribute: str) -> vllm_compat.Private:
    return vllm_compat.Private(module, attribute, "what it is", "why we need it", "-")


@pytest.fixture
def names(monkeypatch):
    entries = {
        "BASE": entry("vllm.kernels", "Base"),
        "HELPER": entry("vllm.kernels", "helper"),
        "LIST": entry("vllm.kernels", "LIST"),
        "ENVS": entry("vllm", "envs"),
    }
    monkeypatch.setattr(compat, "register", lambda: entries)
    monkeypatch.setattr(vllm_compat, "QUANT_OPS", {"quant": ()})
    return entries


def release(folder: Path, version: str, changes: dict[str, str] | None = None) -> compat.Release:
    files = {**BEFORE, "vllm/__init__.py": "", **(changes or {})}
    for name, text in files.items():
        path = folder / version / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / version / f"vllm-{version}+cpu.dist-info").mkdir()
    schema = b"\0re_quant(int) -> ()\0quant(Tensor a, Tensor! b) -> ()\0"
    (folder / version / "vllm" / "_C_stable_libtorch.abi3.so").write_bytes(schema)
    return compat.Release(folder / version)


def report(folder: Path, changes: dict[str, str] | None = None) -> dict[str, list[str]]:
    before, after = compat.extract(release(folder, "1.0.0")), release(folder, "1.1.0", changes)
    return compat.compare(after, compat.extract(after), before)


def test_what_a_name_is(names, tmp_path):
    old = release(tmp_path, "1.0.0")
    assert old.version == "1.0.0"
    found = compat.extract(old)
    assert found["BASE"] == {
        "defined_in": "vllm.kernels.base",
        "kind": "class",
        "signature": ["@classmethod supported(cls) -> bool", "run(self, x)"],
    }
    assert found["HELPER"]["signature"] == ["helper(a, *, b: int=1) -> Any"]
    assert found["LIST"]["signature"] == ["LIST: dict[str, int]"]
    assert found["ENVS"]["kind"] == "module"
    assert found["op quant"]["signature"] == ["quant(Tensor a, Tensor! b) -> ()"]


def test_nothing_to_say_of_the_same_release(names, tmp_path):
    assert not any(report(tmp_path).values())


def test_gone_moved_and_changed(names, tmp_path):
    base = BEFORE["vllm/kernels/base.py"].replace("LIST", "_LIST").replace("def helper", "def helped")
    changes = {
        "vllm/kernels/__init__.py": "from .other import Base\n",
        "vllm/kernels/base.py": base,
        "vllm/kernels/other.py": "class Root:\n    def run(self, x, y): ...\nclass Base(Root): ...\n",
        "vllm/tools.py": "def helper(a): ...\n",
    }
    said = report(tmp_path, changes)
    assert said["BASE"] == [
        "defined in vllm.kernels.other, was in vllm.kernels.base",
        "- @classmethod supported(cls) -> bool",
        "- run(self, x)",
        "+ run(self, x, y)",
    ]
    assert said["HELPER"] == ["moved to vllm.tools"]
    assert said["LIST"] == ["gone"]
    assert said["ENVS"] == said["op quant"] == []


def test_newest_release_judged_before(monkeypatch, tmp_path):
    monkeypatch.setattr(compat, "JUDGED", tmp_path)
    assert compat.judged_before("0.9.0") == ("none", {})
    for version in ("0.9.0", "0.10.0"):
        (tmp_path / f"{version}.json").write_text(json.dumps({"NAME": version}))
    assert [compat.judged_before(version)[0] for version in ("0.8.0", "0.9.1", "0.10.0", "1.0.0")] == [
        "0.9.0", "0.9.0", "0.10.0", "0.10.0",
    ]  # fmt: skip


def test_command(names, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compat, "JUDGED", tmp_path / "judged")
    release(tmp_path, "1.0.0")
    assert compat.main(["--record", str(tmp_path / "1.0.0")]) == 0
    assert compat.main([str(tmp_path / "1.0.0")]) == 0
    release(tmp_path, "1.1.0", {"vllm/kernels/__init__.py": ""})
    assert compat.main([str(tmp_path / "1.1.0")]) == 1
    assert "BASE = vllm.kernels.Base, why we need it\n    moved to vllm.kernels.base" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="neither a wheel"):
        compat.main([str(tmp_path)])


def test_every_entry_is_in_the_installed_vllm():
    if (spec := importlib.util.find_spec("vllm")) is None:
        pytest.skip("vLLM is not installed")
    installed = compat.Release(Path(spec.origin).parents[1])
    missing = [name for name, found in compat.extract(installed).items() if found is None]
    assert [name for name in missing if installed.has_ops or not name.startswith("op ")] == []
