#!/usr/bin/env bash
# One wheel under other versions of PyTorch and Python: builds it in .venv, installs it into a fresh environment for each
# "torch version" or "torch version:python" given, and runs the operators' tests against the installed package.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
.venv/bin/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir "$work" .
wheel=$(echo "$work"/attnkern-*.whl)
echo "$(basename "$wheel") built with torch $(.venv/bin/python -c 'import torch; print(torch.__version__)')"
cp -r tests "$work/tests"
cp pyproject.toml "$work"
failed=0
for wanted in "$@"; do
  version=${wanted%%:*} python=python3
  [[ $wanted == *:* ]] && python=${wanted#*:}
  "$python" -m venv "$work/env"
  "$work/env/bin/python" -m pip install --quiet --disable-pip-version-check "torch==$version" numpy pytest hypothesis "$wheel"
  if (cd "$work" && env/bin/python -m pytest -q -p no:cacheprovider tests/test_ops.py tests/test_window.py \
    tests/test_quantize.py tests/test_pool.py tests/test_promises.py tests/test_nn.py >log 2>&1); then
    echo "torch $version, $("$work/env/bin/python" --version): $(tail -1 "$work/log")"
  else
    echo "torch $version, $("$work/env/bin/python" --version): FAILED"
    tail -30 "$work/log"
    failed=1
  fi
  rm -rf "$work/env"
done
exit "$failed"
