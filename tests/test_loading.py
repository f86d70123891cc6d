"""register(): passive, re-entrant, each feature on its own. What vLLM does with it is asked of vLLM's own loader."""

import logging
import subprocess
import sys

import pytest
from child import answer, run

from vllm_b200_plugin import features, plugin, post_import
from vllm_b200_plugin.features import Feature, FeatureUnavailable, NotForThisPlatform

LOAD = """
import json, sys
from vllm import plugins
plugins.load_general_plugins()
plugins.plugins_loaded = False
plugins.load_general_plugins()
from vllm_b200_plugin import plugin
"""
IMPORT = """
import vllm.model_executor.kernels.linear as linear
import vllm.model_executor.layers.fused_moe.oracle.fp8 as oracle
import torch, vllm.platforms
kernels = [k.__name__ for k in linear._POSSIBLE_FP8_BLOCK_KERNELS[vllm.platforms.current_platform._enum]]
"""


@pytest.mark.parametrize("module", ["vllm_b200_plugin", "vllm_b200_plugin.features", "vllm_b200_plugin.plugin"])
def test_importing_brings_in_neither_torch_nor_vllm(module):
    code = f"import sys, {module}; print([name for name in ('torch', 'vllm') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_vllm_loads_it_and_the_features_wait_for_their_modules():
    pytest.importorskip("vllm")
    code = """
pending = plugin.results()
brought_in = "vllm.model_executor.kernels.linear" in sys.modules
"""
    end = "print(json.dumps([pending, brought_in, plugin.results(), kernels, torch.cuda.is_initialized()]))"
    pending, brought_in, applied, kernels, cuda = answer(LOAD + code + IMPORT + end, VLLM_B200_STRICT="1")
    assert set(pending) == {feature.name for feature in features.FEATURES}
    assert all(pending[feature.name] == ("disabled" if feature.trial else "pending") for feature in features.FEATURES)
    assert not brought_in
    assert applied["fp8_block_linear"] == applied["cpu_fp8_moe"] == "applied"
    assert applied["group_quant_ops"].startswith("for CUDA")
    assert kernels[0] == "B200CpuFp8BlockKernel"
    assert kernels.count("B200CpuFp8BlockKernel") == 1
    assert not cuda


def test_without_the_cuda_library_a_gpu_keeps_vllms_kernels():
    pytest.importorskip("vllm")
    fake = "from fake_cuda import pretend; pretend((9, 0), library=False)\n"
    end = "print(json.dumps([plugin.results(), kernels]))"
    done = run(fake + LOAD + IMPORT + end)
    assert done.returncode == 0, done.stderr[-4000:]
    for feature in ("fp8_block_linear", "group_quant_ops"):
        line = f"[b200] {feature} is off, vLLM keeps its own kernels: was not built"
        assert (done.stdout + done.stderr).count(line) == 1, done.stderr[-4000:]
    assert "B200" not in done.stdout.strip().splitlines()[-1]
    strict = run(fake + LOAD + IMPORT, VLLM_B200_STRICT="1")
    assert strict.returncode != 0
    assert "FeatureUnavailable: was not built" in strict.stderr


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """The plugin as in a new process, with features of the test's own. Yields a function that makes one."""
    pytest.importorskip("vllm")
    monkeypatch.setattr(plugin, "_results", {})
    monkeypatch.setattr(post_import, "_waiting", {})
    monkeypatch.setattr(features, "FEATURES", ())
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("VLLM_B200_DISABLE", raising=False)
    monkeypatch.delenv("VLLM_B200_STRICT", raising=False)
    made = []

    def feature(name: str, apply: str, after: str = "json") -> Feature:
        module = f"{tmp_path.name}_{name}".replace("-", "_")
        (tmp_path / f"{module}.py").write_text(
            "from vllm_b200_plugin.features import *\nfrom vllm_b200_plugin.features import NotForThisPlatform\n"
            f"calls = []\ndef apply():\n    calls.append(1)\n    {apply}\n"
        )
        made.append(module)
        new = Feature(name, "changes", "needs", module, after)
        monkeypatch.setattr(features, "FEATURES", (*features.FEATURES, new))
        return new

    yield feature
    for module in made:
        sys.modules.pop(module, None)


def test_each_feature_is_applied_alone(fresh, caplog):
    fresh("breaks", "1 / 0")
    lacking = fresh("lacks", "raise FeatureUnavailable('no library: build it')")
    fresh("elsewhere", "raise NotForThisPlatform('for CPU')")
    good = fresh("good", "pass")
    with caplog.at_level(logging.INFO, logger="vllm.b200"):
        plugin.register()
        plugin.register()
    assert plugin.results() == {
        "breaks": "ZeroDivisionError: division by zero",
        "lacks": "no library: build it",
        "elsewhere": "for CPU",
        "good": "applied",
    }
    for each in (lacking, good):
        assert sys.modules[each.module].calls == [1]
    lines = [record.message for record in caplog.records]
    assert len(lines) == 2
    assert lines[1] == "[b200] lacks is off, vLLM keeps its own kernels: no library: build it"


@pytest.mark.parametrize(
    "apply, error", [("1 / 0", ZeroDivisionError), ("raise FeatureUnavailable('x')", FeatureUnavailable)]
)
def test_strict_makes_errors_of_reasons(fresh, monkeypatch, apply, error):
    monkeypatch.setenv("VLLM_B200_STRICT", "1")
    fresh("bad", apply)
    with pytest.raises(error):
        plugin.register()


def test_strict_does_not_mind_another_platform(fresh, monkeypatch):
    monkeypatch.setenv("VLLM_B200_STRICT", "1")
    fresh("elsewhere", "raise NotForThisPlatform('for CPU')")
    plugin.register()
    assert plugin.results() == {"elsewhere": "for CPU"}
    assert issubclass(NotForThisPlatform, FeatureUnavailable)


def test_disabled_features_are_left_alone(fresh, monkeypatch, caplog):
    off = fresh("off", "1 / 0")
    fresh("on", "pass")
    monkeypatch.setenv("VLLM_B200_DISABLE", " off ,")
    plugin.register()
    assert plugin.results() == {"off": "disabled", "on": "applied"}
    assert off.module not in sys.modules
    assert not caplog.records


def test_an_unknown_feature_to_disable_is_told(fresh, monkeypatch, caplog):
    fresh("on", "pass")
    monkeypatch.setenv("VLLM_B200_DISABLE", "onn")
    plugin.register()
    assert plugin.results() == {"on": "applied"}
    assert "names no feature of vllm-b200-plugin: onn; the features are on" in caplog.text
    monkeypatch.setenv("VLLM_B200_STRICT", "1")
    with pytest.raises(ValueError, match="onn"):
        plugin.register()


def test_a_feature_waits_for_its_module(fresh, monkeypatch, tmp_path):
    (tmp_path / "b200_awaited").mkdir()
    (tmp_path / "b200_awaited" / "__init__.py").write_text("")
    (tmp_path / "b200_awaited" / "late.py").write_text("value = 1\nseen = __loader__, __spec__.loader\n")
    body = "import b200_awaited.late as m; m.value += 1"
    fresh("waits", body, after="b200_awaited.late")
    plugin.register()
    assert plugin.results() == {"waits": "pending"}
    import b200_awaited.late as late

    assert late.value == 2
    assert plugin.results() == {"waits": "applied"}
    assert type(late.__loader__).__name__ == "SourceFileLoader"
    assert late.seen == (late.__loader__, late.__spec__.loader)
    plugin.register()
    assert late.value == 2


def test_strict_reaches_the_importer(fresh, monkeypatch, tmp_path):
    (tmp_path / "b200_awaited_strictly.py").write_text("")
    monkeypatch.setenv("VLLM_B200_STRICT", "1")
    fresh("bad", "raise FeatureUnavailable('no library')", after="b200_awaited_strictly")
    plugin.register()
    with pytest.raises(FeatureUnavailable, match="no library"):
        import b200_awaited_strictly  # noqa: F401


def test_a_missing_vllm_name_is_a_reason():
    from vllm_b200_plugin.vllm_compat import Private

    with pytest.raises(FeatureUnavailable, match=r"this vLLM has no json.no_such \(a name\)"):
        Private("json", "no_such", "a name", "", "").get()
    with pytest.raises(FeatureUnavailable, match=r"this vLLM has no no_such_module.x"):
        Private("no_such_module", "x", "a name", "", "").get()


def test_the_register_says_what_and_why():
    from vllm_b200_plugin import vllm_compat

    names = [value for value in vars(vllm_compat).values() if isinstance(value, vllm_compat.Private)]
    assert len(names) > 20
    for name in names:  # tests/test_compat.py looks them up, also those that only a GPU's build can import
        assert name.what and name.why and name.until
