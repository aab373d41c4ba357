#!/usr/bin/env bash
# Everything that needs a GPU, in one run planned for nine minutes: build, tests, memory checks, benchmarks, tables.
#
#   benchmarks/gpu.sh [FOLDER]        results go to FOLDER (default benchmarks/results/<device>)
#
# Needs a python3 with a CUDA torch (2.11 to 2.14), nvcc of the same CUDA major, and this checkout; no network.
# COCONUT_REFERENCE, a checkout of the official code, adds it to the tables. It needs transformers 4.46.2 and so its own
# python, COCONUT_REFERENCE_PYTHON: a 62 MB folder, made where there is a network, which uses the torch installed here.
#   pip install --no-compile --no-deps --target ref transformers==4.46.2 'tokenizers<0.21' 'huggingface_hub<1' \
#       requests urllib3 idna certifi charset-normalizer
#   printf '#!/bin/sh\nPYTHONPATH=$(dirname "$0") exec python3 "$@"\n' >ref/python && chmod +x ref/python
# COCONUT_FAST_TEST_DATA, a folder with the official code's numbers in golden/, adds its answers to the tests.
# COCONUT_FAST_COMMIT names the commit in the results where this checkout has no .git.
# A step that fails, or exceeds its limit and is interrupted, keeps what it has measured, and the others still run.
# Nothing runs more than 15 s beyond GPU_SECONDS (default 540). GPU_STEPS names the steps to run (default all), which
# also get the time of the others. On the slow host of an H200 125 of 317 GPU tests took 97 s, and nine minutes were not
# enough; three calls there: GPU_STEPS="build bench_graph bench_persistent bench_ops memcheck", "build bench_train
# bench_generate" and "build tests persistent_tests kernel_tests".
set -uo pipefail
cd "$(dirname "$0")/.."
device=$(python3 -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))') || {
    echo "gpu.sh: python3 has no torch that sees a GPU" >&2
    exit 1
}
results=${1:-benchmarks/results/$device}
mkdir -p "$results"
# The nvcc on PATH may be a wrapper or a link, so it is asked where its toolkit is.
toolkit=$(nvcc --dryrun x.cu 2>&1 | sed -n 's/^#\$ TOP=//p' | xargs -r readlink -f)
export CUDA_HOME="${CUDA_HOME:-${toolkit:-/usr/local/cuda}}"
export PATH="$PATH:$CUDA_HOME/bin" # compute-sanitizer is often not on it
# Inductor's workers (of Hugging Face's compiled peer) can outlast their process by minutes: it compiles without them.
export TORCHINDUCTOR_COMPILE_THREADS=1
export PYTHONUNBUFFERED=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$(python3 -c \
    'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}"
total=${GPU_SECONDS:-540}
planned=20 # seconds so far: torch is imported twice above, from a cold disk
status=0 known=

step() { # step NAME SECONDS COMMAND...: its output goes to FOLDER/NAME.log, one line to stdout
    local name=$1 log="$results/$1.log" begun=$SECONDS
    planned=$((planned + $2)) known+=" ${name/build_*/build}"
    local limit=$(((planned < total ? planned : total) - SECONDS)) # plus what earlier steps left over
    [[ -z ${GPU_STEPS:-} || " $GPU_STEPS " == *" ${name/build_*/build} "* ]] || return 0
    shift 2
    if [ $limit -lt 1 ]; then
        printf '%-18s FAILED: no time is left\n' "$name"
        status=1
        return 1
    fi
    rm -f "$results/$name.json" # figures of an earlier call; kept where there is no time for new ones
    timeout --signal=INT --kill-after=15 "$limit" "$@" >"$log" 2>&1
    local code=$?
    [ $code -eq 0 ] || status=1
    printf '%-18s %s in %d s: %s\n' "$name" "$([ $code -eq 0 ] && echo ok || echo "FAILED ($code)")" \
        $((SECONDS - begun)) "$(grep -vE '^\s*$|^\{' "$log" | tail -n 1 | cut -c1-120)"
    return $code
}

suite() { # suite NAME SECONDS ARGUMENTS...: a benchmark; its figures go to FOLDER/bench_NAME.json
    local name=$1 limit=$2
    shift 2
    [ -f "benchmarks/bench_$name.py" ] || return 0
    # A test that takes 40 s shows in the log where it is: one that hangs is killed without a word.
    step "bench_$name" "$limit" python3 -m pytest -q "benchmarks/bench_$name.py" --results "$results" "$@" \
        -o faulthandler_timeout=40
}

# The limits add up to 520 s; the last step gets what is left. Those of the suites are estimates: most of their time
# goes to compiling kernels, to imports, and to the peers.
# CUDA sources that do not compile here cost the persistent kernel, not the Triton kernels and the graphs.
build=(python3 setup.py build_ext --inplace)
step build 60 "${build[@]}" || step build_without_cuda 45 env CUDA_HOME=/nowhere "${build[@]}"
step doctor 10 python3 -m coconut_fast doctor
# The most important benchmarks first: latent passes, answers, training steps.
suite graph 75
suite persistent 25
suite train 100 -k "train_step and bfloat16 and 128"
suite generate 60 -k "bfloat16-1-64-6-64 or bfloat16-500-330-6-12"
# Only the files that have GPU tests, since each process imports all it is given. The persistent kernel's tests run
# separately, because a faulty grid barrier hangs its process. One line per test, so that the log of a killed step shows
# what failed.
mapfile -t gpu_tests < <(grep -l "mark\.gpu" tests/test_*.py | grep -v persistent)
step tests 110 python3 -m pytest -v -m gpu -n "$(nproc)" "${gpu_tests[@]}"
step persistent_tests 15 python3 -m pytest -v -m gpu tests/test_persistent.py
if command -v compute-sanitizer >/dev/null; then
    # Memory errors of the kernels that write to the cache, and of the persistent one. Without the allocator's cache
    # every tensor is a separate allocation, so that an access beyond its end does not land in a neighbour.
    step memcheck 40 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 python3 -m pytest -q \
        -m gpu tests/test_gpu_ops.py tests/test_persistent.py -k \
        "sanitizer and (kv_append or decode_attention or latent_feedback or accept_tokens or persistent)"
else
    echo "memcheck           skipped: there is no compute-sanitizer"
fi
suite ops 25
# The kernels' odd shapes, which run in the interpreter where there is no GPU. No time is planned for them, because the
# last step gets all that the others leave over.
mapfile -t kernel_tests < <(grep -l "@triton.jit" kernels/*.py | sed "s|kernels/|tests/test_|" | xargs ls 2>/dev/null)
step kernel_tests 0 python3 -m pytest -v -n "$(nproc)" "${kernel_tests[@]}"
for name in ${GPU_STEPS:-}; do
    [[ "$known " == *" $name "* ]] || { echo "GPU_STEPS: there is no step $name; they are$known" && status=1; }
done
echo
python3 -m benchmarks.summary "$results"
echo
echo "all of it took $SECONDS s; results in $results"
exit $status
