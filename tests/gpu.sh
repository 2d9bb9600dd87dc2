#!/usr/bin/env bash
# Everything that needs a GPU, on a machine without a network: builds in place with the Python it is given and installs
# nothing. GPU_SHARD=i/n runs a piece: of three or more, the first tests, the second runs the sanitizer and the others
# share the benchmarks; of fewer, the first piece also tests and sanitizes.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
shard=${GPU_SHARD:-1/1}
piece=${shard%/*} pieces=${shard#*/}
if ! [[ $shard =~ ^[0-9]+/[0-9]+$ ]] || ((piece < 1 || piece > pieces)); then
  echo "GPU_SHARD must be i/n with 1 <= i <= n, got '$shard'" >&2
  exit 2
fi
own=$((pieces >= 3 ? 2 : 0)) # pieces before those that share the benchmarks
failed=0

"$python" setup.py --quiet build_ext --inplace
export PYTHONPATH=$PWD
"$python" -m attnkern info

if ((piece == 1)); then
  # A backend that is missing is an error, but for Triton where the GPU is too old for it.
  backends=$("$python" -c 'import torch
new = torch.cuda.get_device_capability() >= (8, 0)
print("native,triton,reference" if new else "native,reference")')
  echo "backends: $backends"
  # Triton compiles one kernel at a time in each process.
  parallel=$("$python" -c 'import xdist; print("-n 8")' 2>/dev/null || true)
  # shellcheck disable=SC2086
  ATTNKERN_TEST_LARGE=1 ATTNKERN_TEST_BACKENDS=$backends "$python" -m pytest -q $parallel \
    tests/test_{ops,window,quantize,pool,promises,device,faults,transforms}.py || failed=1
fi

if ((own == 0 ? piece == 1 : piece == 2)); then
  if sanitizer=$(command -v compute-sanitizer); then
    logs=$(mktemp -d)
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # else what lies behind a tensor belongs to the cache, and is no error
    "${CUDA_HOME:+$CUDA_HOME/bin/}nvcc" -arch=native -o "$logs/control" tests/sanitizer_control.cu
    for tool in memcheck racecheck initcheck synccheck; do
      "$sanitizer" --tool "$tool" "$logs/control" "$tool" >"$logs/control.$tool" 2>&1 || true
      if ! grep -q "SUMMARY: " "$logs/control.$tool"; then
        echo "compute-sanitizer $tool: not run, the host refuses it"
        tail -5 "$logs/control.$tool"
        continue
      elif ! grep -qE "SUMMARY: [1-9]" "$logs/control.$tool"; then
        echo "compute-sanitizer $tool: does not find the planted error"
        tail -5 "$logs/control.$tool"
        failed=1
      fi
      # A small share of the tests: the sanitizer slows kernels down a hundredfold.
      if "$sanitizer" --tool "$tool" --error-exitcode 9 "$python" -m pytest -q -x tests/test_ops.py \
        -k "golden and float32" >"$logs/$tool" 2>&1; then
        echo "compute-sanitizer $tool: no errors"
      elif grep -q "ERROR SUMMARY\|RACECHECK SUMMARY" "$logs/$tool"; then
        echo "compute-sanitizer $tool: errors"
        tail -40 "$logs/$tool"
        failed=1
      else
        echo "compute-sanitizer $tool: not run, the host refuses it"
        tail -5 "$logs/$tool"
      fi
    done
  else
    echo "compute-sanitizer: not run, not installed"
  fi
fi

if ((piece > own)); then
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
  GPU_SHARD=$((piece - own))/$((pieces - own)) "$python" -m benchmarks.run --gpu || failed=1
fi
exit "$failed"
