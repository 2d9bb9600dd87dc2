#!/usr/bin/env bash
# The versions of PyTorch that attnkern supports: compat.sh LOWEST OTHERS..., each "version" or "version:python", in an
# environment of its own. Under the lowest one the source is built, with CUDA where nvcc is found, and the tests of the
# compiled operators and of Triton's interpreter run. Then a wheel is built in .venv, installed under each version, and
# tested as it is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/source"
git ls-files -z | xargs -0 cp --parents -t "$work/source"
operators=(tests/kernels/test_{ops,window,quantize,pool,promises}.py tests/integration/test_nn.py tests/native/test_out_of_memory.py)
failed=0

environment() { # "version" or "version:python", further packages
  local version=${1%%:*} python=python3
  [[ $1 == *:* ]] && python=${1#*:}
  rm -rf "$work/env"
  "$python" -m venv "$work/env"
  "$work/env/bin/python" -m pip install --quiet --disable-pip-version-check "torch==$version" pytest hypothesis "${@:2}"
  echo "torch $version, $("$work/env/bin/python" --version)"
}

check() { # what, folder, pytest's arguments
  if (cd "$2" && "$work/env/bin/python" -m pytest -q -p no:cacheprovider "${@:3}" >"$work/log" 2>&1); then
    echo "  $1: $(tail -1 "$work/log")"
  else
    echo "  $1: FAILED"
    tail -30 "$work/log"
    failed=1
  fi
}

# Triton 3.6, which PyTorch 2.11 brings, interprets with a NumPy before 2.4 only.
environment "$1" "numpy<2.4" setuptools ninja
if (cd "$work/source" && "$work/env/bin/python" setup.py --quiet build_ext --inplace >"$work/log" 2>&1); then
  export PYTHONPATH=$work/source
  "$work/env/bin/python" -m attnkern info | grep "^native" | sed "s/^/  source: /"
  ATTNKERN_TEST_BACKENDS=native,reference check "source, compiled" "$work/source" "${operators[@]}"
  ATTNKERN_TEST_BACKENDS=triton TRITON_INTERPRET=1 check "source, interpreted" "$work/source" tests/kernels/test_ops.py
  unset PYTHONPATH
else
  echo "  source: does not build"
  tail -30 "$work/log"
  failed=1
fi

.venv/bin/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir "$work" .
wheel=$(echo "$work"/attnkern-*.whl)
echo "$(basename "$wheel") built with torch $(.venv/bin/python -c 'import torch; print(torch.__version__)')"
mkdir "$work/installed"
cp -r tests pyproject.toml "$work/installed"
for wanted in "$@"; do
  environment "$wanted" numpy "$wheel"
  check "wheel" "$work/installed" "${operators[@]}"
done
exit "$failed"
