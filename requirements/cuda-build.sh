#!/usr/bin/env bash
# Makes a virtual environment with vLLM's CUDA build for `vllm-b200 explain` on a machine without a GPU, over the
# environment that requirements/setup.sh makes, whose torch and other packages it sees.
#   requirements/cuda-build.sh VLLM_VERSION VENV [BASE_VENV]      BASE_VENV: .venv
# Beside vLLM it installs what vLLM asks for when it selects kernels, in the versions that this vLLM pins.
set -euo pipefail

version=$1 venv=$2 base=${3:-.venv}
TRITON=3.7.1   # what torch 2.13 brings
uv=$base/bin/uv
[[ -x $uv ]] || uv=uv
[[ -x $venv/bin/python ]] || "$uv" venv --quiet --python "$base/bin/python" "$venv"
python=$venv/bin/python
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
below=$("$base/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "import site; site.addsitedir('$below')" >"$site/base.pth"

install() { "$uv" pip install --quiet --no-deps --python "$python" "$@"; }
install "vllm==$version"
pinned() { sed -n "s/^Requires-Dist: $1\(\[[^]]*\]\)\{0,1\}==\([^ ;]*\).*/\2/p" "$site/vllm-$version.dist-info/METADATA" | head -n 1; }
cutlass=$(pinned nvidia-cutlass-dsl)
packages=("triton==$TRITON" cuda-bindings cuda-pathfinder nvidia-ml-py tabulate orjson "nvidia-cutlass-dsl==$cutlass")
for part in base core cu13; do packages+=("nvidia-cutlass-dsl-libs-$part==$cutlass"); done
for name in flashinfer-python apache-tvm-ffi quack-kernels humming-kernels tokenspeed-mla; do
    packages+=("$name==$(pinned "$name")")
done
install "${packages[@]}"
echo "== vLLM $version, CUDA build, in $venv (${SECONDS}s)"
