#!/usr/bin/env bash
# Everything that needs a GPU, in one go of at most 9 minutes: build, tests, memory checks, benchmarks, one table.
#
#   benchmarks/gpu.sh [FOLDER]        results go to FOLDER (default benchmarks/results/<device>)
#
# Needs a python3 with a CUDA torch (2.11 to 2.13), nvcc of the same CUDA major, and this checkout; no network.
# COCONUT_REFERENCE and COCONUT_REFERENCE_PYTHON (see benchmarks/peers) add the official code to the tables.
set -uo pipefail
cd "$(dirname "$0")/.."
device=$(python3 -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))') || {
    echo "gpu.sh: python3 has no torch that sees a GPU" >&2
    exit 1
}
results=${1:-benchmarks/results/$device}
mkdir -p "$results"
export PYTHONUNBUFFERED=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$(python3 -c \
    'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}"
started=$SECONDS
status=0

step() { # step NAME SECONDS COMMAND...: its output in FOLDER/NAME.log, one line here
    local name=$1 limit=$2 log="$results/$1.log" begun=$SECONDS
    shift 2
    timeout "$limit" "$@" >"$log" 2>&1
    local code=$?
    [ $code -eq 0 ] || status=1
    printf '%-22s %s in %d s: %s\n' "$name" "$([ $code -eq 0 ] && echo ok || echo "FAILED ($code)")" \
        $((SECONDS - begun)) "$(grep -vE '^\s*$' "$log" | tail -n 1 | cut -c1-120)"
}

step build 150 python3 setup.py build_ext --inplace
step doctor 30 python3 -m coconut_fast doctor
step tests 150 python3 -m pytest -q -m gpu -n 6 tests
if command -v compute-sanitizer >/dev/null; then
    step memcheck 60 compute-sanitizer --error-exitcode 9 python3 -m pytest -q -m gpu tests -k sanitizer
fi
for suite in ops latent_pass persistent generate train; do
    [ -f "benchmarks/bench_$suite.py" ] || continue
    step "bench_$suite" 100 python3 -m pytest -q "benchmarks/bench_$suite.py" --results "$results"
done
echo
for log in "$results"/bench_*.log; do
    sed -n '/figures of this run/,/^{/p' "$log" | grep -v '^{'
done
echo "all of it took $((SECONDS - started)) s; results in $results"
exit $status
