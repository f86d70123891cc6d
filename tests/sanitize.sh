#!/bin/sh
# Runs every CUDA kernel at small sizes under compute-sanitizer's four tools, side by side, and prints a record:
#   sh tests/sanitize.sh [every] > benchmarks/results/h200/sanitize.txt
# Of the longer lists of cases every `every`-th is run. Exits with the number of tools that found something or did not
# finish within LIMIT seconds. COMMIT: what the record names where this is no git checkout.
set -u
cd "$(dirname "$0")/.." || exit 9
python=${PYTHON:-python}
every=${1:-1}
out=$(mktemp -d)
# A tensor is an allocation of its own: then what lies behind it is out of bounds, and what nobody wrote is known.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in memcheck racecheck initcheck synccheck; do
    command="compute-sanitizer --tool $tool --error-exitcode 99 --print-limit 5 python tests/sanitize_kernels.py $every"
    echo "$command" > "$out/$tool.command"
    (
        begin=$(date +%s)
        PYTHONPATH="tests:.${PYTHONPATH:+:$PYTHONPATH}" timeout "${LIMIT:-300}" compute-sanitizer --tool "$tool" --error-exitcode 99 \
            --print-limit 5 "$python" tests/sanitize_kernels.py "$every" > "$out/$tool.txt" 2>&1
        echo "$?" > "$out/$tool.code"
        echo "$(($(date +%s) - begin))" > "$out/$tool.seconds"
    ) &
done
wait

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | sed 's/^/gpu, driver: /'
compute-sanitizer --version | grep -i version | head -n 1
echo "commit: ${COMMIT:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}"
failed=0
for tool in memcheck racecheck initcheck synccheck; do
    echo
    cat "$out/$tool.command"
    grep -E "calls,|ran to the end|========= (ERROR|RACECHECK) SUMMARY" "$out/$tool.txt"
    code=$(cat "$out/$tool.code")
    echo "exit code $code after $(cat "$out/$tool.seconds") s"
    if [ "$code" != 0 ] || ! grep -q "ran to the end" "$out/$tool.txt"; then
        failed=$((failed + 1))
        grep -vE "calls,|SUMMARY" "$out/$tool.txt" | head -n 60
    fi
done
rm -r "$out"
exit $failed
