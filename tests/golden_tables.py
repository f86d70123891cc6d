"""What vLLM and the plugin choose for public models on four GPUs, against tests/golden/explain.

    python -m tests.golden_tables            differences, as a diff; exit code 1 where there are any
    python -m tests.golden_tables --renew    write the files anew: after a change that is meant to move layers

Needs a virtual environment with vLLM's CUDA build for each version, which requirements/cuda-build.sh makes over this
one; no GPU.
"""

import argparse
import difflib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from vllm_b200_plugin import explain
from vllm_b200_plugin.explain import render

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "explain"
VERSIONS = ("0.32.0", "0.33.0")
CAPABILITIES = ("9.0", "10.0", "10.3", "12.0")
# Name -> tensor-parallel ranks.
MODELS = {
    "qwen3-30b-a3b-bf16": 1,
    "qwen3-30b-a3b-fp8": 1,
    "qwen3-30b-a3b-nvfp4": 1,
    "qwen3-30b-a3b-ct-nvfp4": 1,
    "deepseek-v3-fp8": 1,
    "deepseek-v3.2-nvfp4": 1,
    "kimi-k2-fp8": 1,
    "gpt-oss-120b-mxfp4": 1,
    "mistral-medium-fp8": 8,
    "llama-3.1-8b-fp8": 1,
    "llama-3.1-8b-int8": 1,
}


def write_tables(folder: Path, models: list[str]) -> None:
    """<model>.txt for each model, as the vLLM of this Python has it."""
    with tempfile.TemporaryDirectory() as scratch:
        jobs = []
        for model in models:
            name, path = explain.model_folder(model, Path(scratch))
            jobs += [
                explain.Job(name, str(path), capability, MODELS[model], stock=stock)
                for capability in CAPABILITIES
                for stock in (False, True)
            ]
        tables = explain.pair(explain.explain(jobs))
    folder.mkdir(parents=True, exist_ok=True)
    for model in models:
        mine = [table for table in tables if table["job"]["name"] == model]
        for table in mine:
            table["notes"] = []  # of the machine at hand
        text = [
            f"{model} on {table['job']['capability']}: {table['error']}\n" if "error" in table else render.text([table])
            for table in mine
        ]
        (folder / f"{model}.txt").write_text("\n".join(text))


def environment(version: str, folder: Path) -> Path:
    """Python of the virtual environment with this vLLM, made where it is missing."""
    venv = folder / f"vllm-{version}"
    if not (venv / "bin" / "python").exists():
        script = ROOT / "requirements" / "cuda-build.sh"
        subprocess.run([script, version, venv, sys.prefix], check=True)
    return venv / "bin" / "python"


def differences(expected: Path, found: Path) -> list[str]:
    """Lines of a unified diff of all files in `found` with those in `expected`."""
    lines: list[str] = []
    for name in sorted(path.name for path in found.glob("*.txt")):
        before, after = (
            path.read_text().splitlines() if (path := folder / name).exists() else [] for folder in (expected, found)
        )
        title = f"{expected.name}/{name}"
        lines += difflib.unified_diff(before, after, f"expected/{title}", f"found/{title}", lineterm="", n=2)
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden_tables", description=__doc__.splitlines()[0])
    parser.add_argument("--renew", action="store_true", help="write the files anew")
    parser.add_argument("--versions", nargs="+", default=VERSIONS, choices=VERSIONS, metavar="X.Y.Z")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS, metavar="MODEL")
    parser.add_argument("--environments", type=Path, default=ROOT / "build" / "vllm-cuda", help="where they are made")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.write:
        write_tables(args.write, args.models)
        return 0
    status = 0
    for version in args.versions:
        python = environment(version, args.environments.resolve())
        with tempfile.TemporaryDirectory() as scratch:
            found = Path(scratch) / version
            env = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
            env.pop("PYTHONDONTWRITEBYTECODE", None)  # each GPU's process imports vLLM again
            command = [python, "-m", "tests.golden_tables", "--write", found, "--models", *args.models]
            subprocess.run(command, check=True, env=env, cwd=ROOT)
            lines = differences(GOLDEN / version, found)
            if args.renew:
                (GOLDEN / version).mkdir(parents=True, exist_ok=True)
                for path in found.glob("*.txt"):
                    (GOLDEN / version / path.name).write_text(path.read_text())
        if lines and not args.renew:
            print("\n".join(lines))
            status = 1
        print(f"vLLM {version}: {len(args.models)} models, {len(lines)} lines of difference" + " kept" * args.renew)
    if status:
        print("If this is meant: python -m tests.golden_tables --renew")
    return status


if __name__ == "__main__":
    sys.exit(main())
