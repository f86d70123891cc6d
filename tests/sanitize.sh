#!/bin/sh
# Runs the CUDA kernels' tests under compute-sanitizer's four tools: sh tests/sanitize.sh [pytest arguments].
# Exits with the number of tools that found something.
set -u
cd "$(dirname "$0")/.." || exit 9
[ $# -gt 0 ] || set -- tests/test_quant.py tests/test_token_quant.py tests/test_gated_quant.py tests/test_norm_quant.py \
    tests/test_cache.py tests/test_nvfp4_quant.py tests/test_mx_quant.py -k "not past_2 and not mantissas"
failed=0
for tool in memcheck racecheck initcheck synccheck; do
    echo "== $tool"
    compute-sanitizer --tool $tool --error-exitcode 99 --print-limit 5 \
        python -m pytest -p no:cacheprovider -q -x -m gpu "$@" 2>&1 | tail -n 12 | tee "/tmp/sanitize.$tool.txt"
    grep -q "ERROR SUMMARY: 0 errors\|RACECHECK SUMMARY: 0 hazards" "/tmp/sanitize.$tool.txt" || failed=$((failed + 1))
done
exit $failed
