"""A graph that vLLM compiled with other features, or another version of the plugin, is not used again."""

import pytest
from child import answer

from vllm_b200_plugin import __version__

CODE = """
import json
from vllm import plugins, envs
before = envs.compile_factors()
plugins.load_general_plugins()
from vllm_b200_plugin import plugin
factors = envs.compile_factors()
assert {k: v for k, v in factors.items() if "B200" not in k} == before
from vllm.platforms.interface import Platform
Platform.validate_environ(hard_fail=True)
print(json.dumps([factors["VLLM_B200_PLUGIN"], sorted(k for k, v in factors.items() if "B200" in k and v)]))
"""


@pytest.mark.parametrize(
    "disabled, names",
    [
        ("", "cpu_fp8_moe,fp8_block_linear,group_quant_ops"),
        ("group_quant_ops", "cpu_fp8_moe,fp8_block_linear"),
        ("group_quant_ops,fp8_block_linear,cpu_fp8_moe", ""),
    ],
)
def test_version_and_features_are_part_of_the_key(disabled, names):
    pytest.importorskip("vllm")
    key, ours = answer(CODE, VLLM_B200_DISABLE=disabled, VLLM_B200_STRICT="1")
    assert key == f"{__version__}:{names}"
    assert ours == ["VLLM_B200_PLUGIN"]
