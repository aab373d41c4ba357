#!/usr/bin/env bash
# Everything that needs a GPU, in one go planned for nine minutes: build, tests, memory checks, benchmarks, one table.
#
#   benchmarks/gpu.sh [FOLDER]        results go to FOLDER (default benchmarks/results/<device>)
#
# Needs a python3 with a CUDA torch (2.11 to 2.13), nvcc of the same CUDA major, and this checkout; no network.
# COCONUT_REFERENCE and COCONUT_REFERENCE_PYTHON (see benchmarks/peers) add the official code to the tables.
# A step that fails, or exceeds its limit and is interrupted, keeps what it has measured and stops no other.
set -uo pipefail
cd "$(dirname "$0")/.."
device=$(python3 -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))') || {
    echo "gpu.sh: python3 has no torch that sees a GPU" >&2
    exit 1
}
results=${1:-benchmarks/results/$device}
mkdir -p "$results"
rm -f "$results"/bench_*.json
# The nvcc on the path may be a wrapper or a link: it knows itself where its toolkit is.
toolkit=$(nvcc --dryrun x.cu 2>&1 | sed -n 's/^#\$ TOP=//p' | xargs -r readlink -f)
export CUDA_HOME="${CUDA_HOME:-${toolkit:-/usr/local/cuda}}"
export PATH="$PATH:$CUDA_HOME/bin" # compute-sanitizer is often not on it
export PYTHONUNBUFFERED=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$(python3 -c \
    'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}"
started=$SECONDS
status=0

step() { # step NAME SECONDS COMMAND...: its output in FOLDER/NAME.log, one line here
    local name=$1 limit=$2 log="$results/$1.log" begun=$SECONDS
    shift 2
    timeout --signal=INT --kill-after=5 "$limit" "$@" >"$log" 2>&1
    local code=$?
    [ $code -eq 0 ] || status=1
    printf '%-18s %s in %d s: %s\n' "$name" "$([ $code -eq 0 ] && echo ok || echo "FAILED ($code)")" \
        $((SECONDS - begun)) "$(grep -vE '^\s*$|^\{' "$log" | tail -n 1 | cut -c1-120)"
    return $code
}

suite() { # suite NAME SECONDS ARGUMENTS...: a benchmark; its figures in FOLDER/bench_NAME.json
    local name=$1 limit=$2
    shift 2
    [ -f "benchmarks/bench_$name.py" ] || return 0
    step "bench_$name" "$limit" python3 -m pytest -q "benchmarks/bench_$name.py" --results "$results" "$@"
}

# The limits add up to 540 s; what a step leaves over nobody needs. Those of the suites are estimates.
# CUDA sources that do not compile here cost the persistent kernel, not the Triton kernels and the graphs.
build=(python3 setup.py build_ext --inplace)
step build 100 "${build[@]}" || step build_without_cuda 60 env CUDA_HOME=/nowhere "${build[@]}"
step doctor 10 python3 -m coconut_fast doctor
# Only the files that have such tests: each of the twelve processes reads all it is given. The persistent kernel's by
# themselves, because a grid barrier that goes wrong hangs its process.
mapfile -t gpu_tests < <(grep -l "mark\.gpu" tests/test_*.py | grep -v persistent)
step tests 90 python3 -m pytest -q -m gpu -n 12 "${gpu_tests[@]}"
# The kernels' odd shapes, which run in the interpreter where there is no GPU.
mapfile -t kernel_tests < <(grep -l "@triton.jit" kernels/*.py | sed "s|kernels/|tests/test_|" | xargs ls 2>/dev/null)
step kernel_tests 45 python3 -m pytest -q -n 12 "${kernel_tests[@]}"
step persistent_tests 25 python3 -m pytest -q -m gpu tests/test_persistent.py
if command -v compute-sanitizer >/dev/null; then
    # Memory errors of the kernels that write to the cache, and of the persistent one. Without the allocator's cache
    # every tensor is an allocation of its own, so that an access beyond its end does not land in a neighbour.
    step memcheck 45 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 python3 -m pytest -q \
        -m gpu tests/test_gpu_ops.py tests/test_persistent.py -k \
        "sanitizer and (kv_append or decode_attention or latent_feedback or accept_tokens or persistent)"
else
    echo "memcheck           skipped: there is no compute-sanitizer"
fi
suite ops 45
suite graph 80
suite persistent 25
suite generate 35 -k "bfloat16-1-64-6-64 or bfloat16-16-330-6-12 or bfloat16-500-330-6-12"
suite train 40 -k "train_step and ProsQA" # fp32 and bf16, four processes in all
echo
python3 -m benchmarks.summary "$results"
echo
echo "all of it took $((SECONDS - started)) s; results in $results"
exit $status
