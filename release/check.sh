#!/usr/bin/env bash
# A source archive in an empty folder: builds there with .venv's Python, without CUDA, and runs the tests of its kernels.
set -euo pipefail
python=$(dirname "$(realpath "${BASH_SOURCE[0]}")")/../.venv/bin/python
archive=$(realpath "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tar -xzf "$archive" -C "$work"
cd "$work"/*/
FORCE_CUDA=0 "$python" setup.py --quiet build_ext --inplace
PYTHONPATH=$PWD "$python" tests/run.py native
