#!/bin/sh
# Runs every CUDA kernel at small sizes under compute-sanitizer's four tools, side by side, and prints a record:
#   sh tests/sanitize.sh PARTS [PART ...] > benchmarks/results/h200/sanitize.txt
# The lists of cases are dealt out to PARTS parts, and the parts named (from 0; all when none is) run side by side too:
# "8" is everything, in eight processes a tool; "8 0" an eighth of it. Exits with the number of runs that found something
# or did not finish within LIMIT seconds. COMMIT: what the record names where this is no git checkout.
set -u
cd "$(dirname "$0")/.." || exit 9
python=${PYTHON:-python}
parts=${1:-1}
[ $# -gt 0 ] && shift
chosen=${*:-$(seq 0 $((parts - 1)))}
tools="memcheck racecheck initcheck synccheck"
out=$(mktemp -d)
# A tensor is an allocation of its own: then what lies behind it is out of bounds, and what nobody wrote is known.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export PYTHONPATH="tests:.${PYTHONPATH:+:$PYTHONPATH}"
for part in $chosen; do
    for tool in $tools; do
        (
            begin=$(date +%s)
            timeout "${LIMIT:-600}" compute-sanitizer --tool "$tool" --error-exitcode 99 --print-limit 5 \
                "$python" tests/sanitize_kernels.py "$parts" "$part" > "$out/$tool.$part" 2>&1
            echo "$?" > "$out/$tool.$part.code"
            echo "$(($(date +%s) - begin))" > "$out/$tool.$part.seconds"
        ) &
    done
done
wait

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | sed 's/^/gpu, driver: /'
compute-sanitizer --version | grep -i version | head -n 1
echo "commit: ${COMMIT:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}"
failed=0
for tool in $tools; do
    for part in $chosen; do
        run="$out/$tool.$part"
        echo
        echo "compute-sanitizer --tool $tool --error-exitcode 99 --print-limit 5 python tests/sanitize_kernels.py $parts $part"
        grep -E "calls,|ran to the end|========= (ERROR|RACECHECK) SUMMARY" "$run"
        code=$(cat "$run.code")
        echo "exit code $code after $(cat "$run.seconds") s"
        if [ "$code" != 0 ] || ! grep -q "ran to the end" "$run"; then
            failed=$((failed + 1))
            grep -vE "calls,|SUMMARY" "$run" | head -n 60
        fi
    done
done
rm -r "$out"
echo
echo "$failed runs failed"
exit "$failed"
