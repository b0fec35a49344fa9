#!/usr/bin/env bash
# Profiles steady blocks of a stream with Nsight Systems: bench/nsight/block.sh DIR [options of run_block.py]
# Leaves DIR/block.nsys-rep (for nsys-ui), DIR/block.sqlite and DIR/block.md, and prints the last. PYTHON names the
# interpreter.
set -euo pipefail

if [[ $# -lt 1 ]]; then
  sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
if ! command -v nsys >/dev/null; then
  echo "block.sh: needs nsys (NVIDIA Nsight Systems) on the PATH: it comes with the CUDA toolkit, or alone from NVIDIA's" \
    "developer site" >&2
  exit 2
fi
here=$(dirname -- "${BASH_SOURCE[0]}")
python=${PYTHON:-python3}
dir=$1
shift
mkdir -p "$dir"
report=$dir/block

# Graphs are traced node by node, or a pass would be one bar without kernels.
nsys profile --trace=cuda,nvtx --cuda-graph-trace=node --sample=none --cpuctxsw=none \
  --capture-range=cudaProfilerApi --capture-range-end=stop --force-overwrite=true --output="$report" \
  "$python" "$here/run_block.py" "$@" >&2
nsys export --type=sqlite --force-overwrite=true --output="$report.sqlite" "$report.nsys-rep" >&2
table=$("$python" "$here/block_table.py" "$report.sqlite")
printf '%s\n' "$table" | tee "$report.md"
