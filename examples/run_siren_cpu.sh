#!/usr/bin/env bash
# Trains a small model with SIREN on a CPU: real megatron-core at TP=2, real vLLM rollouts, 60 steps.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
nproc=${NPROC:-2}

usage() {
    cat <<'USAGE'
usage: examples/run_siren_cpu.sh [option of pretrain_siren.py ...]

From nothing to a trained model, on a laptop: makes .venv (tools/setup_venv.sh; skipped when current), builds
the Countdown toy checkpoint in runs/toy-countdown once, and trains it with SIREN for 60 steps on 2 ranks
(TP=2, gloo) with a vLLM server for the rollouts. Everything goes to runs/siren-cpu, or, when that exists, to
runs/siren-cpu-<date>-<time>. Every option goes on to pretrain_siren.py and comes after those of this script,
so that it wins: --num-steps 5, --entropy-method none, --load runs/siren-cpu (goes on with that run), ...

  NPROC=4 examples/run_siren_cpu.sh --pipeline-model-parallel-size 2     # ranks of the job; default 2

The options of pretrain_siren.py:

USAGE
    local python=.venv/bin/python
    [ -x "$python" ] || python=python3
    "$python" pretrain_siren.py --help
}

# The value that an option is given, as "--name value" or "--name=value"; the last one wins, as in argparse.
value_of() {
    local name=$1 found=
    shift
    while [ $# -gt 0 ]; do
        case "$1" in
            "$name") found=${2:-} ;;
            "$name"=*) found=${1#*=} ;;
        esac
        shift
    done
    printf '%s' "$found"
}

overwrite=
for argument in "$@"; do
    case "$argument" in
        -h | --help)
            usage
            exit 0
            ;;
        --overwrite) overwrite=yes ;;
    esac
done

save=$(value_of --save "$@")
if [ -z "$save" ]; then
    save=$(value_of --load "$@") # a run that goes on stays where it is
fi
if [ -z "$save" ]; then
    save=runs/siren-cpu
    if [ -e "$save" ] && [ -z "$overwrite" ]; then
        save=runs/siren-cpu-$(date +%Y%m%d-%H%M%S)
        echo "runs/siren-cpu exists: this run goes to $save"
    fi
fi

tools/setup_venv.sh
.venv/bin/python tools/make_toy_checkpoint.py countdown --output runs/toy-countdown

options=(
    --hf-checkpoint runs/toy-countdown
    --prompt-data runs/toy-countdown/prompts/train.jsonl
    --reward countdown
    --tensor-model-parallel-size 2
    --num-steps 60
    --rollout-batch-size 32
    --rollout-num-samples 8
    --rollout-max-response-length 16
    --seq-length 64
    --global-batch-size 64
    --micro-batch-size 16
    --lr 1e-4
    --entropy-method siren
    --entropy-coeff 0.1
    --save "$save"
    "$@"
)

export OMP_NUM_THREADS=1 # two ranks and vLLM on few cores: their thread pools would fight
# A mistake in the options is one line and exit code 2 here; under torchrun it would be a page.
WORLD_SIZE=$nproc .venv/bin/python pretrain_siren.py "${options[@]}" --check
# torchrun that waits for a run that is told to end. --standalone picks a free port: two runs on a machine do
# not meet.
exec .venv/bin/python -m siren_megatron.launch --standalone --nproc-per-node "$nproc" \
    pretrain_siren.py "${options[@]}"
