#!/usr/bin/env bash
# Full-size steps on the GPU of this machine, and the tests of kernels there: one command.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/results}
export PYTHONPATH=$PWD
JAX_PLATFORMS=cuda python -m pytest -q -p no:cacheprovider -o addopts= tests/test_attention.py -k cudnn_itself ||
  echo "cuDNN's attention differs or could not be tested" >&2
python benchmarks/gpu.py --size xnli --out "$out/gpu_xnli.json"
python benchmarks/gpu.py --size langbridge --rows 4 --contenders cudnn cudnn-full torch \
  --out "$out/gpu_langbridge_4.json"
python benchmarks/gpu.py --size langbridge --contenders cudnn-full torch \
  --out "$out/gpu_langbridge.json"
