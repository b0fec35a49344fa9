#!/usr/bin/env bash
# Profiles one operation with Nsight Compute: bench/nsight/kernel.sh DIR OP [options of run_op.py]
# Leaves DIR/OP.ncu-rep (for ncu-ui) and DIR/OP.txt, its details, and prints those. PYTHON names the interpreter.
set -euo pipefail

if [[ $# -lt 2 ]]; then
  sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
if ! command -v ncu >/dev/null; then
  echo "kernel.sh: needs ncu (NVIDIA Nsight Compute) on the PATH: it comes with the CUDA toolkit, or alone from NVIDIA's" \
    "developer site" >&2
  exit 2
fi
here=$(dirname -- "${BASH_SOURCE[0]}")
python=${PYTHON:-python3}
dir=$1 op=$2
shift
mkdir -p "$dir"
report=$dir/$op

# The caches are emptied before each pass and the clocks held at their base (both are ncu's defaults).
sections=(SpeedOfLight MemoryWorkloadAnalysis ComputeWorkloadAnalysis Occupancy LaunchStats WarpStateStats)
ncu --target-processes all --profile-from-start off "${sections[@]/#/--section=}" \
  --force-overwrite --export "$report" "$python" "$here/run_op.py" "$@" >&2
ncu --import "$report.ncu-rep" --page details >"$report.part"
mv "$report.part" "$report.txt"
cat "$report.txt"
