#!/usr/bin/env bash
# Everything that a machine with a Hopper GPU should run: build and install, the tests marked `gpu`,
# compute-sanitizer's memcheck over a small subset of them and of the native benchmarks' checks, the
# soak, and the benchmarks.
#
#   scripts/gpu_check.sh [LOG_DIR]
#
# Logs, the benchmark's JSON and plots, and summary.txt go to LOG_DIR, by default $OUT, else build/gpu_check/.
# Every step runs whatever became of those before it; the exit status is 0 if all passed.
#
# compute-sanitizer and nvcc are a CUDA toolkit's: the sanitizer's Python package lacks the launcher that
# it starts programs with.
#
# Environment:
#   PYTHON    the interpreter to make the virtual environment build/gpu_venv with (python3)
#   NO_VENV   if set, PYTHON is used as it is: it must hold jax with CUDA support, jax_flashmla with
#             the extra `test`
#   JOBS      processes that run the tests (8)
#   TEST_SPACE  "whole" for all of FlashMLA's space of dense decode, not a quarter of it
#   GRID      the benchmark's grid (targets)
set -uo pipefail
cd "$(dirname "$0")/.."
logs=${1:-${OUT:-build/gpu_check}}
mkdir -p "$logs"
logs=$(cd "$logs" && pwd)
: >"$logs/summary.txt"
python=${PYTHON:-python3}
PATH=$PATH:/usr/local/cuda/bin
failures=0
# Python runs with -P where it would otherwise find the sources here before the installed package.

# step NAME COMMAND...: runs it, keeps its output in NAME.log, and notes how it ended.
step() {
  local name=$1 begin=$SECONDS status=0
  shift
  echo "== $name: $*"
  "$@" 2>&1 | tee "$logs/$name.log" || status=$?
  echo "$name: $([ "$status" -eq 0 ] && echo passed || echo "FAILED ($status)"), $((SECONDS - begin)) s" |
    tee -a "$logs/summary.txt"
  [ "$status" -eq 0 ] || failures=$((failures + 1))
}

install() {
  "$python" -m venv build/gpu_venv &&
    build/gpu_venv/bin/pip install '.[test]' 'jax[cuda13]'
}

# Without a usable GPU the tests would be skipped, which must not pass for success.
info() {
  nvidia-smi && "$python" -P -c '
import sys
import jax
import jax_flashmla
from jax_flashmla.cli import main
main(["info"])
jax.local_devices(backend="cuda")
sys.exit(jax_flashmla.kernel_refusal("cuda"))
'
}

# Neighbouring tests, which are compiled alike, stay in one process.
tests() {
  XLA_PYTHON_CLIENT_PREALLOCATE=false "$python" -P -m pytest -m gpu \
    -n "${JOBS:-8}" --dist worksteal --durations 30
}

small_subset="cuda-kernel and (outside or bad_block or num_new or hostile_values)"
small_subset+=" or cuda-kernel and (rows_and_query or products_and_rotations) or sums_that_blocks"
small_subset+=" or out_of_range or clamped"
small_subset+=" or nothing_to_attend or number_of_parts or other_lengths"

sanitizer_options=(--tool memcheck --error-exitcode 9 --report-api-errors no
  --kernel-name kns=flashmla)

# Hostile values, every way of splitting, dropped rows. Each buffer is an allocation of its own, so
# that reaching past one is seen.
memcheck() {
  XLA_PYTHON_CLIENT_ALLOCATOR=platform compute-sanitizer "${sanitizer_options[@]}" \
    "$python" -P -m pytest -q -m gpu -k "$small_subset" \
    tests/ops/test_{dense_decode,cache_append,latent_append,index_append,project}.py
}

# A few checks of each native benchmark but those that need several GPUs or take no `small`.
native_memcheck() {
  local objects=build/native source name status=0
  mkdir -p "$objects"
  find csrc/sm90 benchmarks/native -name '*.cu' ! -name bench_all_reduce_sum.cu \
    ! -name bench_dense_decode.cu -print0 |
    xargs -0 -P "$(nproc)" -I{} sh -c 'nvcc -O3 -std=c++20 -I csrc --expt-relaxed-constexpr \
      -gencode=arch=compute_90a,code=sm_90a -c -o "$0/$(echo "$1" | tr / _).o" "$1"' \
      "$objects" {} || return
  for source in "$objects"/benchmarks_native_*.o; do
    name=$objects/$(basename "$source" .cu.o)
    nvcc -gencode=arch=compute_90a,code=sm_90a -o "$name" "$source" "$objects"/csrc_*.o &&
      compute-sanitizer "${sanitizer_options[@]}" "$name" small || status=1
  done
  return "$status"
}

if [ -z "${NO_VENV:-}" ]; then
  step install install
  python=$PWD/build/gpu_venv/bin/python
fi
step info info
step tests tests
step memcheck memcheck
step native_memcheck native_memcheck
step soak "$python" -P scripts/soak.py
step reruns "$python" -P scripts/soak.py --reruns 200
for grid in "${GRID:-targets}" layers; do
  step "bench_$grid" "$python" -P -m jax_flashmla.cli bench --grid "$grid" \
    --json "$logs/$grid.json" --plots "$logs"
done
step bench_mla_step "$python" -P benchmarks/bench_mla_step.py --json "$logs/mla_step.json"

echo
cat "$logs/summary.txt"
[ "$failures" -eq 0 ]
