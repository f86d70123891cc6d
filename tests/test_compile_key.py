"""A graph that vLLM compiled with other features, or another version of the plugin, is not used again."""

import pytest
from child import answer

from vllm_b200_plugin import __version__
from vllm_b200_plugin.features import FEATURES

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


ON = {feature.name for feature in FEATURES if not feature.trial}
TRIALS = {feature.name for feature in FEATURES if feature.trial}
IN_GRAPHS = {feature.name for feature in FEATURES if feature.in_graphs}
NOT_FOR_CPU = {"few_token_graphs"}  # which shows at once: vLLM has imported what it changes


@pytest.mark.parametrize(
    "disabled, asked_for", [(set(), set()), ({"group_quant_ops"}, TRIALS), (ON, set())], ids=["on", "trials", "off"]
)
def test_version_and_features_are_part_of_the_key(disabled, asked_for):
    pytest.importorskip("vllm")
    switches = {"VLLM_B200_DISABLE": ",".join(disabled), "VLLM_B200_ENABLE": ",".join(asked_for)}
    key, ours = answer(CODE, **switches, VLLM_B200_STRICT="1")
    assert key == f"{__version__}:{','.join(sorted(((ON | asked_for) - disabled - NOT_FOR_CPU) & IN_GRAPHS))}"
    assert ours == ["VLLM_B200_PLUGIN"]
