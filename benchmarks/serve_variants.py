"""What is compared: stock vLLM, and the plugin with all of its features or some of them."""

from collections.abc import Iterable
from dataclasses import dataclass

from vllm_b200_plugin import features
from vllm_b200_plugin.environment import CannotRun

FEATURE_NAMES = tuple(feature.name for feature in features.FEATURES)


@dataclass(frozen=True)
class Variant:
    """side: "stock" or "plugin". features: those of the plugin that are switched on, sorted. name: for tables."""

    side: str
    features: tuple[str, ...]
    name: str

    def environment(self) -> dict[str, str]:
        """What the engine's process needs on top of ours to be this variant."""
        if self.side == "stock":
            return {"VLLM_PLUGINS": "none"}
        return {
            "VLLM_B200_DISABLE": ",".join(name for name in FEATURE_NAMES if name not in self.features),
            "VLLM_B200_ENABLE": ",".join(self.features),
        }


STOCK = Variant("stock", (), "stock")


def plugin(names: Iterable[str] | None = None) -> Variant:
    """The plugin with the features `names`; without them, with those that are on here.

    Raises CannotRun for a name that is no feature's, and where none is left.
    """
    known = ", ".join(FEATURE_NAMES)
    chosen = {feature.name for feature in features.enabled()} if names is None else set(names)
    if unknown := sorted(chosen - set(FEATURE_NAMES)):
        raise CannotRun(f"unknown feature {', '.join(unknown)}; the plugin's features are {known}.")
    if not chosen:
        raise CannotRun(
            f"no feature is switched on, so there is nothing to compare; the plugin's features are {known}."
        )
    return Variant("plugin", tuple(sorted(chosen)), "plugin")


def split(text: str) -> list[str]:
    """The names in a comma-separated list."""
    return [name for name in map(str.strip, text.split(",")) if name]


def ablation(names: Iterable[str], all_but: bool = True) -> list[Variant]:
    """All of `names`, each alone, and, with all_but, all but each; a set that comes twice is measured once."""
    every = tuple(sorted(names))
    variants = [Variant("plugin", every, "all")]
    variants += [Variant("plugin", (name,), f"only {name}") for name in every]
    if all_but:
        variants += [Variant("plugin", tuple(x for x in every if x != name), f"all but {name}") for name in every]
    distinct: dict[tuple[str, ...], Variant] = {}
    for variant in variants:
        if variant.features:
            distinct.setdefault(variant.features, variant)
    return list(distinct.values())
