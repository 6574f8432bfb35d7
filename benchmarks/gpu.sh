#!/usr/bin/env bash
# Measures on a borrowed GPU, in eight minutes at most, from a fresh checkout: see gpu.py. DRY_RUN=1: tiny shapes.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
exec timeout 480 python3 -m benchmarks.gpu ${DRY_RUN:+--dry-run} "$@"
