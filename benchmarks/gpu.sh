#!/usr/bin/env bash
# Speed and memory of this code on a CUDA card, in one table and within 8 minutes:
#   bash benchmarks/gpu.sh [--size 1b|7b|tiny]
# Parity in bfloat16, memory of the loss, training steps and decoding of a random Janus-Pro,
# with each attention implementation that is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python
exec "${PYTHON:-$python}" benchmarks/gpu.py "$@"
