"""Passes of ours over the graphs that vLLM compiles, behind its own."""

import hashlib
import inspect
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch._inductor import pattern_matcher

from vllm_b200_plugin import __version__, vllm_compat
from vllm_b200_plugin.integration import report

_Base: Any = vllm_compat.INDUCTOR_PASS.get()
_makers: list[Callable[[Any], Any]] = []  # of vLLM's configuration; None: no pass for it


class FusionPass(_Base):
    """Replaces what its patterns find.

    line: for the report, once something was found. modules: whose sources the patterns are made of, besides the class's
    own. matched_count: places replaced in the last graph.
    """

    line: ClassVar[tuple[str, str, str]]
    modules: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        self.matched_count = 0
        self.patterns = pattern_matcher.PatternMatcherPass(pass_name=type(self).__name__)

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.matched_count = self.patterns.apply(graph)
        if self.matched_count:
            report.chosen(*self.line)

    def uuid(self) -> str:
        """What the patterns and replacements depend on: their sources and the package's version."""
        sources = [inspect.getsource(sys.modules[name]) for name in (__name__, type(self).__module__, *self.modules)]
        return hashlib.sha256("".join([__version__, *sources]).encode()).hexdigest()


def add(make: Callable[[Any], Any]) -> None:
    """Have vLLM's pass manager add make(config), where that is not None, behind its own passes; once."""
    if make not in _makers:
        _makers.append(make)
    manager = vllm_compat.POST_GRAD_PASSES.get()
    configure = manager.configure
    if hasattr(configure, "_b200"):
        return

    def configured(self: Any, config: Any) -> None:
        configure(self, config)
        for maker in _makers if config.model_config is not None else ():
            if (ours := maker(config)) is not None:
                self.add(ours)

    configured._b200 = True  # type: ignore[attr-defined]
    manager.configure = configured
