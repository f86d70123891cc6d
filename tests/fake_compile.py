"""What vLLM's passes make of a model's graph on a pretended GPU: its real configuration, model code and passes, up to
where inductor would generate code. For a child process, behind fake_cuda.pretend."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Ops that vLLM's passes, or the model, name; alike in vLLM 0.32 and 0.33.
OPS = (
    "silu_and_mul(Tensor! result, Tensor input) -> ()",
    "cutlass_scaled_mm(Tensor! out, Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, Tensor? bias) -> ()",
    "rms_norm_static_fp8_quant(Tensor! result, Tensor input, Tensor weight, Tensor scale, float epsilon) -> ()",
    "dynamic_scaled_fp8_quant(Tensor! result, Tensor input, Tensor! scale) -> ()",
    "fused_add_rms_norm(Tensor! input, Tensor! residual, Tensor? weight, float epsilon) -> ()",
    "rotary_embedding(Tensor positions, Tensor! query, Tensor!? key, int head_size, Tensor cos_sin_cache, bool is_neox)"
    " -> ()",
)
_kept: list[torch.library.Library] = []


class _NoCode(Exception):
    """The passes have run."""


def prepare() -> None:
    """Everything that vLLM's passes ask its extension for when they are imported; traced on CPU tensors."""
    import vllm
    import vllm.platforms
    from vllm.utils.deep_gemm import DeepGemmQuantScaleFMT

    library = torch.library.Library("_C", "FRAGMENT")
    _kept.append(library)
    passes = Path(vllm.__file__).parent / "compilation" / "passes"
    named = {name for file in passes.rglob("*.py") for name in re.findall(r"torch\.ops\._C\.(\w+)", file.read_text())}
    schemas = {schema.split("(")[0]: schema for schema in OPS}
    for name in sorted(named | set(schemas)):
        if not hasattr(torch.ops._C, name) and "fp4" not in name:  # for those they ask whether they exist
            library.define(schemas.get(name, f"{name}(Tensor x) -> ()"))
    for name in sorted(named):
        if hasattr(torch.ops._C, name) and not torch._C._dispatch_has_kernel_for_dispatch_key(f"_C::{name}", "Meta"):
            torch.library.register_fake(f"_C::{name}", lambda *args, **kwargs: None, lib=library)
    type(vllm.platforms._current_platform).device_type = "cpu"
    DeepGemmQuantScaleFMT.init_oracle_cache()  # as a worker does


def engine_config(folder: str) -> Any:
    """vLLM's configuration for the model in `folder`, as `vllm serve` makes it."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_b200_plugin import vllm_compat

    info = vllm_compat.MODEL_INFO.get()
    vllm_compat.LAZY_MODEL.get().inspect_model_cls = lambda self: info.from_model_cls(self.load_model_cls())
    config = EngineArgs(model=folder, load_format="dummy", skip_tokenizer_init=True).create_engine_config()
    config.device_config.device = torch.device("cpu")
    return config


def model(config: Any) -> torch.nn.Module:
    """With memory for weights, on CPU, and nothing compiled."""
    from vllm.config.compilation import CompilationMode
    from vllm.distributed import parallel_state

    from vllm_b200_plugin.explain import child

    if torch.distributed.is_initialized():  # for the model before
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()
    mode, config.compilation_config.mode = config.compilation_config.mode, CompilationMode.NONE
    config.compilation_config.static_forward_context.clear()
    built = child._model(config, 1).to_empty(device="cpu")
    config.compilation_config.mode = mode
    return built


class Compiler:
    """vLLM's settings of inductor and its passes for one configuration. passes: vLLM's pass manager."""

    def __init__(self, config: Any):
        from vllm.compilation.backends import VllmBackend
        from vllm.config import set_current_vllm_config

        self.config = config
        with set_current_vllm_config(config):
            backend = VllmBackend(config)
            backend.configure_post_pass()
        self.passes, self.settings = backend.pass_manager, {**backend.inductor_config, "fx_graph_cache": False}

    def optimised(
        self, function: Callable[..., Any], inputs: tuple[Any, ...], run: bool = False, first: int = 1
    ) -> tuple[torch.fx.Graph, Any]:
        """The graph of function(*inputs) behind the passes, and with `run` what that graph gives on CPU.

        first: where the compile range begins.

        The first dimensions of matrices are dynamic.
        """
        import torch._inductor.config as inductor_config
        from torch._inductor.compile_fx import compile_fx, fake_tensor_prop, view_to_reshape
        from torch._inductor.fx_passes.post_grad import post_grad_passes
        from torch._inductor.virtualized import V
        from vllm.compilation.passes.inductor_pass import pass_context
        from vllm.config import set_current_vllm_config
        from vllm.config.utils import Range

        graphs = []

        def inner(graph: torch.fx.GraphModule, example_inputs: list[Any], **kwargs: Any) -> Any:
            with V.set_fake_mode(torch._guards.detect_fake_mode(example_inputs)):
                view_to_reshape(graph)
                fake_tensor_prop(graph, example_inputs)
                post_grad_passes(graph, is_inference=True)
            graphs.append(graph.graph)
            if not run:
                raise _NoCode
            return graph.forward

        def backend(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
            with inductor_config.patch(self.settings), pass_context(Range(first, 2048)):
                return compile_fx(graph, example_inputs, inner_compile=inner)

        for tensor in inputs:
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 2:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        torch._dynamo.reset()
        results = None
        with set_current_vllm_config(self.config), torch.no_grad():
            try:
                results = torch.compile(function, backend=backend, fullgraph=True)(*inputs)
            except torch._dynamo.exc.BackendCompilerFailed as error:
                if not isinstance(error.inner_exception, _NoCode):
                    raise
        return graphs[0], results
