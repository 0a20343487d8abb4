#!/usr/bin/env bash
# Full-size steps on the GPU of this machine, and the tests of kernels there: one command.
#
#     bash benchmarks/gpu.sh [SECONDS]
#
# It ends after SECONDS (default 540) and says what it could not measure.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/results} end=$((SECONDS + ${1:-540})) missing="" started=$(mktemp)
mkdir -p "$out"
export PYTHONPATH=$PWD

measure() {  # NAME COMMAND...
  local name=$1 left=$((end - SECONDS))
  shift
  ((left < 20)) && missing+=" $name" && return
  timeout "$left" "$@" >"$out/gpu_$name.log" 2>&1
  local status=$?
  ((status == 0)) || missing+=" $name (status $status)"
}

JAX_PLATFORMS=cuda measure kernels \
  python -m pytest -q -p no:cacheprovider -o addopts= tests/test_attention.py -k cudnn_itself
measure xnli python benchmarks/gpu.py --size xnli --out "$out/gpu_xnli.json" \
  --contenders cudnn plain cudnn-full cudnn-none-int8 torch
measure langbridge_4 python benchmarks/gpu.py --size langbridge --rows 4 \
  --contenders cudnn cudnn-full cudnn-full-int8 torch --out "$out/gpu_langbridge_4.json"
measure langbridge python benchmarks/gpu.py --size langbridge --contenders cudnn-full torch \
  --out "$out/gpu_langbridge.json"
measure langbridge_int4 python benchmarks/gpu.py --size langbridge --rows 4 \
  --contenders cudnn-full-int4 --out "$out/gpu_langbridge_int4.json"
mapfile -t measured < <(find "$out" -name 'gpu_*.json' -newer "$started" | sort)  # no older ones
((${#measured[@]} == 0)) || python benchmarks/gpu.py --table "${measured[@]}"
rm "$started"
if [[ -n $missing ]]; then
  echo "not measured, or not in full:$missing (see $out/gpu_*.log)" >&2
  exit 1
fi
