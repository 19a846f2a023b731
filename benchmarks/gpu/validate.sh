#!/usr/bin/env bash
# Validate and time lsgm_fast on a GPU machine, from a source tree, with nothing to install and no network.
set -uo pipefail

usage() {
  cat <<'TEXT'
usage: benchmarks/gpu/validate.sh [options] [part ...]

Runs the parts in order, goes on after a failure, and exits non-zero if any part failed.

parts (default: all)
  env                      hardware, driver, versions, commit, clocks, load
  build                    the compiled libraries, into the source tree; skipped where LSGM_FAST_LIBRARY_PATH names some
  tests                    the test suite, with the GPU visible
  kernels                  every fused kernel against float64 on all sample inputs, and under compute-sanitizer
  ops                      fused operations against eager and torch.compile, with achieved bandwidth
  solver                   whole solves with a network that costs nothing: the solver's own arithmetic
  decode                   latents to images: eager, torch.compile and the kernels, beside the floor of bytes
  score                    an evaluation of the score network, likewise
  paper                    every published configuration by part and way, beside its floor
  time-small               mnist, omniglot
  time-cifar               cifar10-fid (cifar10-balanced has the same networks)
  time-cifar-nll           cifar10-nll
  time-celeba              celebahq256-quantitative
  time-celeba-stage2       celebahq256-qualitative-stage2
  time-celeba-qualitative  celebahq256-qualitative

options
  --budget SECONDS  per part (default 420): a part stops cleanly and records what it left out; it is killed
                    60 seconds later
  --dry-run         on the CPU, with one tiny preset a part and few repeats; the tests are only collected; figures
                    are marked as a trial
  --force           time although others use the machine; the record says so
  --commit SHA      commit to record in place of what git says
  --no-solved       time the fixed number of evaluations only
  -h, --help

environment
  OUT     folder for <machine>/<part>.json (default: benchmarks/results; a dry run: benchmarks/results/dry-run)
  PYTHON  interpreter (default: python3)
TEXT
}

die() {
  echo "validate.sh: $*" >&2
  exit 2
}

all_parts=(env build tests kernels ops solver decode score paper time-small time-cifar time-cifar-nll time-celeba time-celeba-stage2 time-celeba-qualitative)
parts=()
budget=420
dry_run=0
timing=()
ops=()
solver=()
forward=()
paper=()
common=()

while (($#)); do
  case $1 in
    --budget) [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || die "--budget expects seconds, got '${2:-}'"; budget=$2; shift ;;
    --dry-run) dry_run=1 ;;
    --force) timing+=(--force); ops+=(--force); solver+=(--force); forward+=(--force); paper+=(--force) ;;
    --no-solved) timing+=(--no-solved); paper+=(--no-solved) ;;
    --commit) [[ -n ${2:-} ]] || die "--commit expects a commit"; common+=(--commit "$2"); shift ;;
    -h | --help) usage; exit 0 ;;
    -*) die "unknown option '$1' (see --help)" ;;
    *)
      [[ " ${all_parts[*]} " == *" $1 "* ]] || die "unknown part '$1': expected one of ${all_parts[*]}"
      parts+=("$1")
      ;;
  esac
  shift
done
if ! ((${#parts[@]})); then
  parts=("${all_parts[@]}")
  # The others would time the same tiny presets again.
  ((dry_run)) && parts=(env tests time-small time-cifar time-celeba)
fi

out=${OUT:-}
[[ -z $out || $out == /* ]] || out=$PWD/$out
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
if [[ -z $out ]]; then
  out=benchmarks/results
  ((dry_run)) && out=benchmarks/results/dry-run
fi
mkdir -p "$out" && [[ -w $out ]] || die "cannot write to $out: choose another folder with OUT=..."

python=${PYTHON:-python3}
command -v "$python" >/dev/null || die "no '$python' here: choose an interpreter with PYTHON=..."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

common+=(--out "$out")
if ((dry_run)); then
  # Tiny networks on what may be a busy machine: more threads would only wait for each other.
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  common+=(--device cpu --dry-run)
  timing+=(--force --batch 2 --repeats 3 3)
  ops+=(--quick --rounds 3 --force)
  solver+=(--force --batch 2 --rounds 2)
  forward+=(--force --batch 2 --repeats 3 3)
  paper+=(--force --batch 2)
else
  common+=(--device cuda)
fi

presets_of() {
  if ((dry_run)); then
    case $1 in
      time-small | decode | score | paper) echo tiny-binary ;;
      solver) echo tiny-rgb ;;
      time-cifar*) echo tiny-rgb ;;
      time-celeba*) echo tiny-multiscale ;;
    esac
    return
  fi
  case $1 in
    time-small) echo mnist omniglot ;;
    solver) echo mnist cifar10-fid cifar10-nll celebahq256-quantitative celebahq256-qualitative ;;
    decode) echo mnist cifar10-nll celebahq256-quantitative ;;
    score) echo mnist cifar10-fid celebahq256-quantitative ;;
    # The two with a published number of evaluations first.
    paper) echo celebahq256-quantitative cifar10-fid mnist omniglot cifar10-nll celebahq256-qualitative-stage2 celebahq256-qualitative ;;
    time-cifar) echo cifar10-fid ;;
    time-cifar-nll) echo cifar10-nll ;;
    time-celeba) echo celebahq256-quantitative ;;
    time-celeba-stage2) echo celebahq256-qualitative-stage2 ;;
    time-celeba-qualitative) echo celebahq256-qualitative ;;
  esac
}

limited() { timeout --foreground --kill-after=15 "$((budget + 60))" "$@"; }

run_part() {
  local presets
  case $1 in
    env) limited "$python" -m benchmarks.validation env "${common[@]}" ;;
    tests) limited "$python" -m benchmarks.validation tests "${common[@]}" --budget "$budget" ;;
    build)
      if [[ -n ${LSGM_FAST_LIBRARY_PATH:-} ]]; then
        echo "using the libraries in $LSGM_FAST_LIBRARY_PATH"
      else
        LSGM_FAST_BUILD=$( ((dry_run)) && echo cpu || echo cuda) limited "$python" setup.py build_native --inplace
      fi
      ;;
    ops) limited "$python" -m benchmarks.ops --name ops --budget "$budget" ${ops[@]+"${ops[@]}"} "${common[@]}" ;;
    solver)
      read -ra presets <<<"$(presets_of "$1")"
      limited "$python" -m benchmarks.solver --presets "${presets[@]}" --budget "$budget" \
        ${solver[@]+"${solver[@]}"} "${common[@]}"
      ;;
    decode | score)
      read -ra presets <<<"$(presets_of "$1")"
      limited "$python" -m "benchmarks.$1" --presets "${presets[@]}" --budget "$budget" \
        ${forward[@]+"${forward[@]}"} "${common[@]}"
      ;;
    paper)
      read -ra presets <<<"$(presets_of "$1")"
      limited "$python" -m benchmarks.paper --presets "${presets[@]}" --budget "$budget" \
        ${paper[@]+"${paper[@]}"} "${common[@]}"
      ;;
    kernels) limited "$python" -m benchmarks.kernels "${common[@]}" --budget "$budget" ;;
    time-*)
      read -ra presets <<<"$(presets_of "$1")"
      limited "$python" -m benchmarks.published --presets "${presets[@]}" --name "$1" --budget "$budget" \
        ${timing[@]+"${timing[@]}"} "${common[@]}"
      ;;
  esac
}

trap 'echo "interrupted" >&2; exit 130' INT
failed=0
summary=()
for part in "${parts[@]}"; do
  echo "== $part"
  start=$SECONDS
  run_part "$part"
  status=$?
  took=$((SECONDS - start))
  case $status in
    0) word=ok ;;
    3) word="refused: machine busy" ;;
    124 | 137) word="out of time" ;;
    *) word=failed ;;
  esac
  ((status == 0)) || failed=1
  summary+=("$(printf '%-24s %3d  %4d s  %s' "$part" "$status" "$took" "$word")")
  "$python" -m benchmarks.validation status --part "$part" --exit-status "$status" --seconds "$took" "${common[@]}" \
    || { echo "validate.sh: the exit status of $part could not be recorded" >&2; failed=1; }
done
echo "== summary"
printf '%s\n' "${summary[@]}"
exit "$failed"
