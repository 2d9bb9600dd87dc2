#!/usr/bin/env bash
# Tests the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: builds a copy of the tree, runs the
# operators' tests, and plants an error for each sanitizer, which must find it: sanitize.sh [python].
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=${1:-$root/.venv/bin/python}
[[ $python == */* ]] && python=$(realpath -s "$python")
cxx=${CXX:-g++}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1 ATTNKERN_TEST_BACKENDS=native PYTHONPATH=$work
torch=$("$python" -c 'import torch; print(torch.__path__[0])')
hash=$("$python" -c 'import runpy; print(runpy.run_path("attnkern/_schemas.py")["HASH"])')
mapfile -t sources < <(awk '$1 == "cpu" {print $2}' csrc/sources.txt)
cp -r attnkern csrc tests pyproject.toml "$work"
rm -f "$work"/attnkern/*.so
cd "$work"
failed=0
# Without tests that limit memory or fork, because ASan reserves terabytes of addresses and other processes lack its
# library, and without test_accuracy, which repeats one shape with many seeds.
suitable="not accuracy and not fails_once and not larger_than_any_memory and not forked and not does_not_import"
sanitizers="-fsanitize=address,undefined,float-cast-overflow"

build() { # attnkern/_C.so of the copy; compiles the sources that have no object; the compiler's further options
  local pids=()
  for source in "${sources[@]}"; do
    [[ -e $(basename "$source").o ]] && continue
    # -O1 keeps the kernels' vectors (omp simd) and the frames of a report.
    "$cxx" -std=c++20 -O1 -g1 -fPIC -fopenmp-simd -fno-math-errno -fno-trapping-math -fvisibility=hidden \
      -fno-omit-frame-pointer "$sanitizers" -fno-sanitize-recover=all "-DATTNKERN_SCHEMA_HASH=\"$hash\"" -Icsrc \
      -isystem "$torch/include" "$@" -c "$source" -o "$(basename "$source").o" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid"; done
  "$cxx" -shared "$sanitizers" -o attnkern/_C.so ./*.cpp.o -L"$torch/lib" -ltorch -ltorch_cpu -lc10
}

run() { # pytest's arguments
  local preload
  # Python is not instrumented: ASan is preloaded, with the C++ library, whose throw it intercepts.
  preload="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libstdc++.so)"
  # -s: pytest would capture reports. No leak detection: Python and PyTorch do not free everything at exit.
  LD_PRELOAD=$preload ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
    "$python" -m pytest -q -s -p no:cacheprovider "$@" >log 2>&1
}

plant() { # sanitizer, its message, file, sed script that plants the error
  local name=$1 finding=$2 file=$3 script=$4
  local object=${file##*/}
  object=${object/_kernels.h/.cpp}.o # kernels are compiled with their operators
  cp "$file" original
  sed -i "$script" "$file"
  if cmp -s "$file" original; then
    echo "$name: nothing was planted, because $script matches no line of $file"
    failed=1
    return
  fi
  rm -f "$object"
  build -DATTNKERN_BASELINE_ONLY # a third of the code
  if run tests/kernels/test_window.py -k hard_rectangles; then
    echo "$name: FAILED, the planted error was not found"
    failed=1
  elif grep -q "$finding" log; then
    echo "$name: the planted error is found: $(grep -m 1 "$finding" log)"
  else
    echo "$name: FAILED, the planted error was reported differently"
    tail -30 log
    failed=1
  fi
  cp original "$file"
  rm "$object" # the next build must not reuse it
}

where=$("$python" -c 'import attnkern; print(attnkern.__path__[0])')
[[ $where == "$work/attnkern" ]] || { echo "attnkern comes from $where, not from the copy" >&2; exit 1; }
build
# Every case with every shape, layout and dtype; of the other tests a sample.
every="tests/kernels/test_ops.py tests/kernels/test_memory_layout.py"
for selection in "$every" "tests/kernels --quick --ignore tests/kernels/test_model_backends.py ${every//tests/--ignore tests}"; do
  # shellcheck disable=SC2086 # several arguments
  if run $selection -k "$suitable"; then
    echo "tests: $(tail -1 log)"
  else
    echo "tests: FAILED"
    grep -n -m 5 -A 12 "ERROR: AddressSanitizer\|runtime error" log || tail -30 log
    failed=1
  fi
done
plant address "ERROR: AddressSanitizer: heap-buffer-overflow" csrc/cpu/window_kernels.h \
  's/A\* to = map + image \* positions;/A* to = map + (image + 1) * positions;/'
plant undefined "runtime error: signed integer overflow" csrc/cpu/window_kernels.h \
  's/const auto frames = windows.frames(image);/const auto frames = windows.frames(image + (INT64_MAX + positions) - INT64_MAX - positions);/'
echo "sanitize: $SECONDS s"
exit "$failed"
