#!/usr/bin/env bash
# Full-size steps on the GPU of this machine, and the tests of kernels there: one command.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/results}
export PYTHONPATH=$PWD
for size in xnli langbridge; do
  python benchmarks/gpu.py --size "$size" --out "$out/gpu_$size.json"
done
