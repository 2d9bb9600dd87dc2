#!/usr/bin/env bash
# Everything that needs a GPU, on a machine without a network: builds in place with the Python it is given, installs
# nothing. Run in pieces with GPU_SHARD=i/n; piece 1 holds the tests and the sanitizer, every piece its share of the
# benchmarks.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
shard=${GPU_SHARD:-1/1}

"$python" setup.py --quiet build_ext --inplace
export PYTHONPATH=$PWD
"$python" -m attnkern info

if [ "${shard%%/*}" = 1 ]; then
  failed=0
  "$python" -m pytest -q tests/test_ops.py tests/test_window.py tests/test_quantize.py tests/test_pool.py \
    tests/test_promises.py || failed=1
  if sanitizer=$(command -v compute-sanitizer); then
    for tool in memcheck racecheck initcheck synccheck; do
      # A small share of the tests: the sanitizer slows kernels down a hundredfold.
      if "$sanitizer" --tool "$tool" --error-exitcode 9 "$python" -m pytest -q -x tests/test_ops.py -k golden \
        >"/tmp/attnkern-$tool.log" 2>&1; then
        echo "compute-sanitizer $tool: no errors"
      elif grep -q "ERROR SUMMARY" "/tmp/attnkern-$tool.log"; then
        echo "compute-sanitizer $tool: errors"
        tail -40 "/tmp/attnkern-$tool.log"
        failed=1
      else
        echo "compute-sanitizer $tool: not run, the host refuses it"
      fi
    done
  else
    echo "compute-sanitizer: not run, not installed"
  fi
  [ "$failed" = 0 ]
fi
"$python" -m benchmarks.run --gpu
