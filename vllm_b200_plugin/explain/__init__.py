"""`vllm-b200 explain`: which kernel every layer of a model gets on a GPU that need not be there, and why."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_b200_plugin import environment, features
from vllm_b200_plugin.environment import CannotRun
from vllm_b200_plugin.explain import page, render, stubs
from vllm_b200_plugin.explain.gpus import gpu
from vllm_b200_plugin.model_shapes import MODEL_SHAPES

DEFAULT_CAPABILITIES = ("9.0", "10.0")
_CHILD = "vllm_b200_plugin.explain.child"


@dataclass(frozen=True)
class Options:
    """model: a folder with config.json, such a file, or a name in MODEL_SHAPES. stock: vLLM without the plugin."""

    model: str
    capabilities: tuple[str, ...] = DEFAULT_CAPABILITIES
    tp: int = 1
    ep: bool = False
    stock: bool = False
    json: Path | None = None
    html: Path | None = None
    brief: bool = False


@dataclass(frozen=True)
class Job:
    """One model to build, as the child reads it. model: a folder. features: to switch off where stock."""

    name: str
    model: str
    capability: str
    tp: int = 1
    ep: bool = False
    stock: bool = False
    features: str = ",".join(feature.name for feature in features.FEATURES)


def run(options: Options) -> int:
    """Print the tables and write the files that are asked for; 0, or 1 where a model could not be built."""
    if options.tp < 1:
        raise CannotRun(f"--tp takes a number of ranks from 1 on, got {options.tp}.")
    if options.ep and options.tp == 1:
        raise CannotRun("--ep spreads experts over ranks: it needs --tp of 2 or more.")
    with tempfile.TemporaryDirectory(prefix="vllm_b200_explain_") as scratch:
        name, folder = model_folder(options.model, Path(scratch))
        jobs = [
            Job(name, str(folder), capability, options.tp, options.ep, stock)
            for capability in options.capabilities
            for stock in ((True,) if options.stock else (False, True))
        ]
        tables = pair(explain(jobs))
    failed = [table for table in tables if "error" in table]
    for table in failed:
        print(f"vllm-b200: {table['job']['name']} on {table['job']['capability']}: {table['error']}", file=sys.stderr)
    built = [table for table in tables if "error" not in table]
    if built:
        print(render.text(built, details=not options.brief))
    if options.json:
        options.json.write_text(json.dumps(built, indent=1) + "\n")
    if options.html:
        options.html.write_text(page.html(built))
    return 1 if failed else 0


def model_folder(model: str, scratch: Path) -> tuple[str, Path]:
    """(name, folder with config.json); configurations that are no folder of that kind are written to scratch."""
    path = Path(model)
    if model in MODEL_SHAPES:
        text, name = json.dumps(MODEL_SHAPES[model]), model
    elif (path / "config.json").is_file():
        _read(path / "config.json")
        return path.resolve().name, path.resolve()
    elif path.is_file():
        text, name = _read(path), path.stem if path.stem != "config" else path.resolve().parent.name
    elif path.is_dir():
        raise CannotRun(f"{model} has no config.json.")
    else:
        raise CannotRun(f"{model} is neither a folder, a config.json nor one of {', '.join(MODEL_SHAPES)}.")
    folder = scratch / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(text)
    return name, folder


def _read(path: Path) -> str:
    """The text of a config.json. Raises CannotRun where it is no configuration of a model."""
    text = path.read_text(errors="replace")
    try:
        config = json.loads(text)
    except ValueError as error:
        raise CannotRun(f"{path} is not JSON: {error}.") from None
    if not isinstance(config, dict) or not config.get("architectures"):
        raise CannotRun(f"{path} names no architectures, so vLLM cannot tell what to build.")
    return text


def explain(jobs: list[Job]) -> list[dict[str, Any]]:
    """A table for each job, in the order of the jobs, or {"job", "error"}.

    Raises CannotRun where vLLM is missing, a CPU build or cannot be imported.
    """
    for capability in {job.capability for job in jobs}:
        try:
            gpu(capability)
        except ValueError as error:
            raise CannotRun(f"{error}.") from None
    check_vllm()
    done = subprocess.run(
        [sys.executable, "-m", _CHILD],
        input=json.dumps([asdict(job) for job in jobs]),
        capture_output=True,
        text=True,
        env=_environment(),
        cwd=tempfile.gettempdir(),
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    if os.environ.get("VLLM_B200_EXPLAIN_LOG"):
        print(done.stderr, file=sys.stderr)
    if done.returncode or len(found) != len(jobs):
        said = (done.stderr.strip().splitlines() or ["nothing was printed"])[-1]
        raise CannotRun(f"vLLM could not be imported as on a GPU: {said}")
    order = {json.dumps(asdict(job)): index for index, job in enumerate(jobs)}
    return sorted(found, key=lambda table: order[json.dumps(table["job"])])


def check_vllm() -> None:
    """Raises CannotRun where there is no CUDA build of vLLM."""
    environment.check_vllm()
    folder = environment.module_folder("vllm")
    if folder is None or not list(folder.glob("_C_stable_libtorch*.so")):
        raise CannotRun(
            "explain asks the CUDA build of vLLM, and the installed one is for another device: install the CUDA build "
            "in an environment of its own (requirements/cuda-build.sh in the source makes one); no GPU is needed."
        )


def _environment() -> dict[str, str]:
    """For the child: no device in sight, no network, stand-ins for libraries that are missing."""
    path = [*stubs.library_path(), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    tools = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    home = os.environ.get("CUDA_HOME") or ("/usr/local/cuda" if shutil.which("/usr/local/cuda/bin/nvcc") else None)
    return {
        **os.environ,
        "LD_LIBRARY_PATH": os.pathsep.join(path),
        "PATH": tools,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        # FlashInfer's compiled kernels are taken as had, from its cubin package or a network.
        "VLLM_HAS_FLASHINFER_CUBIN": os.environ.get("VLLM_HAS_FLASHINFER_CUBIN", "1"),
        **({"CUDA_HOME": home} if home else {}),
    }


def pair(tables: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tables with the plugin, each with the rows of stock vLLM as "stock"; those of stock alone stay."""
    stock = {_place(table): table for table in tables if table["job"]["stock"]}
    with_plugin = [table for table in tables if not table["job"]["stock"]]
    for table in with_plugin:
        other = stock.get(_place(table), {})
        table["stock"] = other.get("rows", [])
        if "error" in other:
            table.setdefault("error", f"stock vLLM: {other['error']}")
    for table in tables:
        table["notes"] = _notes(table)
    return with_plugin or tables


def _place(table: dict[str, Any]) -> tuple[Any, ...]:
    job = table["job"]
    return job["model"], job["capability"], job["tp"], job["ep"]


def _notes(table: dict[str, Any]) -> list[str]:
    notes = list(filter(None, [table.get("assumption")]))
    if "rows" in table and not table.get("quantised"):
        notes.append("the configuration names no quantisation, so the weights are taken as they come")
    applied = ("applied", "for CPU", "disabled")
    notes += [f"{name} is off: {state}" for name, state in table.get("features", {}).items() if state not in applied]
    return notes
