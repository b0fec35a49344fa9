#!/usr/bin/env bash
# What a rented GPU can tell about echo-rt, in one command, the most valuable first:
#
#     bench/gpu.sh OUT [--budget SECONDS] [--steps NAME,...] [--device cuda|cpu]
#
# OUT gets two files, each replaced whole after every step: gpu-check.tar.gz, the results and logs of all steps so far, and
# summary.md, their table. --budget is wall time for everything, by default 420 s on a GPU. --steps runs only some, for a
# second try. --device cpu rehearses with emulated kernels and a tiny model. PYTHON names an interpreter that has torch.
# Exit code: 0 every step passed, 1 one did not, 2 wrong arguments or no GPU, 128+N ended by signal N.
set -uo pipefail

usage() { sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
refuse() {
  echo "gpu.sh: $1" >&2
  exit 2
}

out='' budget='' device=cuda only=''
while (($#)); do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" && continue ;;
    --budget | --device | --steps)
      (($# > 1)) || refuse "expected a value after $1, found none"
      case $1 in --budget) budget=$2 ;; --device) device=$2 ;; *) only=$2 ;; esac
      shift
      ;;
    -*) refuse "unknown option $1; see --help" ;;
    *)
      [[ -z $out ]] || refuse "expected one folder, found $out and $1"
      out=$1
      ;;
  esac
  shift
done
[[ -n $out ]] || refuse "expected a folder for the results, found none; see --help"
case $device in
  cuda) backend=cuda size=released slower=1 && : "${budget:=420}" ;;
  cpu) backend=emulated size=tiny slower=10 && : "${budget:=3600}" ;;
  *) refuse "expected --device cuda or cpu, found $device" ;;
esac
[[ $budget =~ ^[1-9][0-9]{0,5}$ ]] || refuse "expected --budget in whole seconds, found $budget"
mkdir -p "$out" 2>/dev/null && out=$(cd "$out" && pwd) && [[ -w $out ]] || refuse "$out: expected a folder to write into"
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

python=${PYTHON:-python3}
grace=5 packing=5 # seconds to end in after TERM, and to pack in
log_bytes=1000000 # kept of a step's output
wheels=build/travel # what bench/travel.py gathers
start=$(date +%s)
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT || exit 2
results=$work/gpu-check
export PYTHONPATH=$work/packages:$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir "$results" && printf 'step\tstate\tseconds\tlimit\texit code\tnote\n' >"$results/steps.tsv"
names=() listing=1 group='' current='' failed=0

# Everything so far goes into OUT. A file there is whole at any moment: a rental may end at any moment.
pack() {
  timeout -k 1 "$packing" "$python" bench/gpu_table.py "$results" >"$results/summary.md" 2>"$work/stderr"
  (($? < 2)) || cat "$work/stderr" >>"$results/summary.md"
  tar -C "$work" -czf "$out/.part" gpu-check && mv -f "$out/.part" "$out/gpu-check.tar.gz"
  cp "$results/summary.md" "$out/.part" && mv -f "$out/.part" "$out/summary.md"
}

elapsed() { echo $(($(date +%s) - start)); }

# record STATE SECONDS LIMIT CODE NOTE: the end of the current step.
record() {
  printf '%s\t%s\t%s\t%s\t%s\t%s\n' "$current" "$@" >>"$results/steps.tsv"
  printf '%-12s %-11s %4s s  %s\n' "$current" "$1" "$2" "$5"
  [[ $1 == passed ]] || failed=1
  current=''
  pack
}

# A step's output is kept, without the middle of a long one.
keep_log() {
  local log=$results/$current/log.txt
  (($(stat -c %s "$work/log") <= log_bytes)) && mv "$work/log" "$log" && return
  { head -c $((log_bytes / 2)) "$work/log" && printf '\n[...]\n' && tail -c $((log_bytes / 2)) "$work/log"; } >"$log"
}

# step NAME LEAST LIMIT COMMAND...: run COMMAND in at most LIMIT seconds, or not at all where fewer than LEAST are left.
# $proof is a pattern that its output must have. {} in COMMAND stands for the step's folder.
step() {
  local name=$1 least=$(($2 * slower)) limit=$(($3 * slower)) left code note
  shift 3
  [[ -z $listing ]] || { names+=("$name") && return; }
  [[ -z $only || ,$only, == *,$name,* ]] || return 0
  current=$name begun=$(elapsed) left=$((budget - $(elapsed) - grace - packing))
  ((left >= least)) || { record skipped 0 0 '' "needs $least s, $((left > 0 ? left : 0)) s are left" && return 1; }
  limit=$((limit < left ? limit : left))
  mkdir "$results/$name"
  timeout -k "$grace" "$limit" "${@//\{\}/$results/$name}" >"$work/log" 2>&1 </dev/null &
  group=$!
  wait "$group"
  code=$?
  kill -KILL -- "-$group" 2>/dev/null # what the command left running: timeout made a group of it all
  group=''
  note=$(grep -v '^[[:space:]]*$' "$work/log" | tail -n 1 | tr '\t' ' ' | cut -c 1-160)
  [[ $code != 0 || -z ${proof:-} ]] || grep -Eq "$proof" "$work/log" || { code=proof && note="its output lacks: $proof"; }
  keep_log
  case $code in
    0) record passed $(($(elapsed) - begun)) "$limit" 0 '' ;;
    124 | 137) record 'timed out' $(($(elapsed) - begun)) "$limit" "$code" "$note" && return 1 ;;
    *) record failed $(($(elapsed) - begun)) "$limit" "$code" "$note" && return 1 ;;
  esac
}

stopped() {
  trap '' INT TERM
  [[ -z $group ]] || kill -KILL -- "-$group"
  [[ -z $current ]] || { [[ ! -e $work/log ]] || keep_log; record interrupted $(($(elapsed) - begun)) '' '' "by SIG$1"; }
  exit $((128 + $2))
}
trap 'stopped INT 2' INT
trap 'stopped TERM 15' TERM

script() { # NAME LEAST LIMIT FILE ARGUMENTS...: a benchmark on this device
  local name=$1 least=$2 limit=$3 file=$4
  shift 4
  step "$name" "$least" "$limit" "$python" "bench/$file.py" --out {} --device "$device" "$@"
}
bench() { # NAME LEAST LIMIT ARGUMENTS...: echo-rt bench on this device
  local name=$1 least=$2 limit=$3
  shift 3
  step "$name" "$least" "$limit" "$python" -m echo_rt bench --out {} --device "$device" "${block[@]}" "$@"
}
tests() { # NAME LEAST LIMIT ARGUMENTS...: tests, of which some must not be skipped
  local name=$1 least=$2 limit=$3
  shift 3
  proof='[1-9][0-9]* passed' step "$name" "$least" "$limit" "$python" -m pytest -q -p no:cacheprovider "$@"
}
many=()
[[ $device == cpu ]] || ! "$python" -c 'import xdist' 2>/dev/null || many=(-n 4)
formulas=(tests/ops/test_ops.py tests/ops/test_ops_convolution.py tests/ops/test_ops_float8.py)
block=(--size "$size" --backend "$backend" --no-chart --no-peers --rounds 1)
if [[ $device == cpu ]]; then
  block+=(--blocks 2) dtype=bfloat16 chosen='emulated and small and bfloat16' others=(tests/utils/test_device.py)
  ops=(--op flow_step --op memory_update --op library)
else
  block+=(--blocks 10) dtype=float8 chosen=cuda others=(-m cuda tests "${formulas[@]/#/--ignore=}")
  ops=()
  # All of the table of docs/speed.md, the largest first.
  for op in library causal_conv_hopper rms_silu_window gated_residual_norm qkv_norm_rope_store reanchor upsample_conv \
    causal_conv memory_update memory_attention gated_update gated_residual_norm_quantize gelu_quantize \
    modulated_layer_norm modulated_layer_norm_quantize frames_to_uint8 flow_step counter_noise; do ops+=(--op "$op"); done
fi

plan() {
  step machine 5 60 "$python" bench/environment.py --device "$device" --out {} ||
    refuse "$(tail -n 1 "$results/machine/log.txt"); PYTHON names another python, --device cpu rehearses without a GPU"
  local install=("$python" -m pip install -q --no-index --no-deps -t "$work/packages")
  [[ ! -d $wheels ]] || step packages 5 60 "${install[@]}" "$wheels"/*.whl
  step build 40 150 env "ECHO_RT_BUILD=$backend" "$python" setup.py build_ext --inplace
  # Exit code 1: something that generate needs is not there, which no step here does.
  proof="backend $backend +available" step doctor 10 60 sh -c '"$0" -m echo_rt doctor || [ $? = 1 ]' "$python"
  tests operations 20 90 "${many[@]}" "${formulas[@]}" tests/ops/test_kernels.py -k "$chosen"
  script golden 20 75 golden --quick
  bench block 40 120 --dtype bfloat16 --variants evolve
  script vae 25 75 vae --quick --no-peers --backend "$backend"
  bench float8 40 100 --dtype "$dtype" --variants evolve
  bench memory 45 110 --dtype bfloat16 --variants evolve,off
  script kernels 15 75 kernel_times --quick --size "$size" "${ops[@]}"
  script attention 15 45 attention --size "$size"
  script profile 30 75 block_profile --size "$size" --backend "$backend"
  [[ $device == cpu ]] || for tool in memcheck racecheck; do step $tool 20 75 "$python" bench/sanitizer.py $tool; done
  tests others 20 200 "${many[@]}" "${others[@]}"
}

plan
for name in ${only//,/ }; do
  [[ " ${names[*]} " == *" $name "* ]] || refuse "--steps may name ${names[*]}; found $name"
done
listing=''
plan
cat "$results/summary.md"
exit $failed
