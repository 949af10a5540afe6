#!/usr/bin/env bash
#SBATCH --job-name=siren-7b-tp4
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=siren-7b-tp4-%j.out
# Trains Qwen2.5-Math-7B with SIREN at TP=4 on a SLURM cluster: submits itself, and is what it submits.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: [VARIABLE=value ...] bash examples/run_siren_7b_tp4.sh [--dry-run] [option of pretrain_siren.py ...]
       [VARIABLE=value ...] sbatch [options] examples/run_siren_7b_tp4.sh [option of pretrain_siren.py ...]

  HF_CHECKPOINT=/models/Qwen2.5-Math-7B PROMPT_DATA=train.jsonl bash examples/run_siren_7b_tp4.sh

Plans the run, refuses it when it does not fit, submits it with sbatch and says where its output goes.
--dry-run prints the plan (placement, memory of each GPU, tokens and estimated seconds of a step) and ends; it
needs neither SLURM nor the checkpoint. Called with sbatch, the machines are sbatch's business: give it --nodes
and --gpus-per-node, and the job takes its numbers from SLURM. Options of pretrain_siren.py come after this
script's own, so that they win.

Variables, with their defaults:
  HF_CHECKPOINT      directory of the Hugging Face checkpoint (required; nothing is downloaded)
  PROMPT_DATA        JSONL or .parquet files of prompts and answers, with blanks between them (required)
  RUN_DIR            runs/qwen2.5-math-7b-siren: train/ holds the run, logs/ the logs of every rank
  PYTHON             .venv/bin/python, else python3: where siren-megatron is installed
  NODES              1
  GPUS_PER_NODE      8; 0 = CPUs (gloo), for trying it out
  RANKS_PER_NODE     1: trainer ranks of a node, on CPUs only
  ROLLOUT_GPUS       4: the last GPUs of a node are its vLLM servers' alone (disaggregated); 0 = one server
                     shares GPU 0 with the trainer (colocated)
  ROLLOUT_SLEEP      1: what a colocated server frees while the trainer trains (--rollout-sleep): 1 its KV cache,
                     its weights move to the machine's memory, 2 both, 0 nothing
  ROLLOUT_NODES      all: nodes that have vLLM servers; or first, the others' GPUs are then all the trainer's
  ROLLOUT_TP         ROLLOUT_GPUS: tensor-parallel size of a server; 2 makes two servers of four GPUs
  ROLLOUT_SERVERS    1: vLLM servers of such a node, on CPUs only
  GPU                h100-80gb: the kind of GPU that the plan assumes (tools/plan.py --help lists them)
  TP, PP, CP, EP     4, 1, 1, 1: tensor-, pipeline-, context- and expert-parallel size
  NUM_STEPS          250: rollout steps; two epochs of N prompts are 2N/128
  SAVE_INTERVAL      10: steps between checkpoints, of which the last two are kept (14 bytes a parameter each)
  EVAL_DATA          none: JSONL or .parquet files of problems to evaluate on, with blanks between them
  EVAL_INTERVAL      20: steps between evaluations (16 responses, temperature 0.6, top-p 0.7, as the paper's)
  TIME_LIMIT         24:00:00
  WARNING_SECONDS    600: this long before the time limit the run is told to save, and the job is requeued
  SBATCH_OPTIONS     further options of sbatch, e.g. "--partition=gpu --account=abc"
  SRUN_OPTIONS       further options of srun, e.g. "--container-image=... --cpu-bind=none"
  MAX_REQUEUES       100: the job ends for good after this many

What runs: one torchrun a node; each node's first rank starts its vLLM servers, and rank 0 asks them all. A job
that is interrupted (time limit, node failure, a killed step) is requeued and resumes from its newest checkpoint,
as long as attempts save steps: two in a row that save none end it. docs/slurm.md tells more.

`python pretrain_siren.py --help` lists the options of the run.
USAGE
}

die() {
    printf 'run_siren_7b_tp4.sh: error: %s\n' "$1" >&2
    exit "${2:-2}"
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

# sbatch runs a copy of this file from SLURM's own directory: the repository is found by the original's path.
repository() {
    local here
    here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    if [ -f "$here/pretrain_siren.py" ]; then
        printf '%s' "$here"
        return
    fi
    local command
    command=$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null | sed -n 's/^ *Command=\([^ ]*\).*/\1/p')
    for here in "${SIREN_REPOSITORY:-}" "${command%/examples/*}" "${SLURM_SUBMIT_DIR:-}"; do
        if [ -n "$here" ] && [ -f "$here/pretrain_siren.py" ]; then
            printf '%s' "$here"
            return
        fi
    done
    die "pretrain_siren.py is not found: submit from the repository, or set SIREN_REPOSITORY"
}

whole_number() {
    case "${!1}" in
        '' | *[!0-9]*) die "$1 is '${!1}'; it has to be a whole number" ;;
    esac
}

# What every mode needs: variables checked, and `options`, the run's own.
prepare() {
    cd "$(repository)"
    : "${NODES:=${SLURM_JOB_NUM_NODES:-1}}" "${GPUS_PER_NODE:=8}" "${RANKS_PER_NODE:=1}" "${ROLLOUT_GPUS:=4}"
    : "${ROLLOUT_NODES:=all}" "${ROLLOUT_TP:=$ROLLOUT_GPUS}" "${ROLLOUT_SERVERS:=1}"
    : "${ROLLOUT_SLEEP:=1}"
    : "${GPU:=h100-80gb}" "${TP:=4}" "${PP:=1}" "${CP:=1}" "${EP:=1}" "${NUM_STEPS:=250}" "${SAVE_INTERVAL:=10}"
    : "${TIME_LIMIT:=24:00:00}" "${WARNING_SECONDS:=600}" "${MAX_REQUEUES:=100}"
    : "${RUN_DIR:=runs/qwen2.5-math-7b-siren}" "${HF_CHECKPOINT:=}" "${PROMPT_DATA:=}"
    : "${SBATCH_OPTIONS:=}" "${SRUN_OPTIONS:=}" "${EVAL_DATA:=}" "${EVAL_INTERVAL:=20}"
    if [ -z "${PYTHON:-}" ]; then
        PYTHON=$PWD/.venv/bin/python
        [ -x "$PYTHON" ] || PYTHON=python3
    fi
    local name
    for name in NODES GPUS_PER_NODE RANKS_PER_NODE ROLLOUT_GPUS ROLLOUT_TP ROLLOUT_SERVERS ROLLOUT_SLEEP TP PP CP EP \
        NUM_STEPS SAVE_INTERVAL EVAL_INTERVAL WARNING_SECONDS MAX_REQUEUES; do
        whole_number "$name"
    done
    [ "$GPUS_PER_NODE" -gt 0 ] || ROLLOUT_GPUS=0
    [ "$SAVE_INTERVAL" -gt 0 ] || die "SAVE_INTERVAL is 0: a requeued job could not resume"
    [ -z "$(value_of --save "$@")" ] || die "--save: set RUN_DIR instead, the run goes to its train/"
    [ -z "$(value_of --rollout-nodes "$@")" ] || die "--rollout-nodes: set ROLLOUT_NODES instead"
    case "$ROLLOUT_NODES" in
        all | first) ;;
        *) die "ROLLOUT_NODES is '$ROLLOUT_NODES'; it has to be all or first" ;;
    esac
    case "$RUN_DIR" in
        /*) ;;
        *) RUN_DIR=$PWD/$RUN_DIR ;;
    esac
    train=$RUN_DIR/train

    # The paper's run (arXiv 2509.25133): 128 prompts x 8 responses a step, 8 prompts an optimizer step.
    options=(
        --hf-checkpoint "${HF_CHECKPOINT:-none}"
        --reward math
        --num-steps "$NUM_STEPS"
        --rollout-batch-size 128
        --rollout-num-samples 8
        --seq-length 4096
        --rollout-max-response-length 3072
        --rollout-temperature 1.0
        --global-batch-size 64
        --max-tokens-per-microbatch 16384
        --lr 1e-6
        --lr-warmup-steps 5
        --weight-decay 0.1
        --entropy-method siren
        --entropy-coeff 0.005
        --entropy-top-p 0.8
        --siren-peak-quantile 0.8
        --tensor-model-parallel-size "$TP"
        --pipeline-model-parallel-size "$PP"
        --context-parallel-size "$CP"
        --expert-model-parallel-size "$EP"
        --use-distributed-optimizer
        --distributed-timeout-minutes 30
        --rollout-nodes "$ROLLOUT_NODES"
        --rollout-request-timeout 3600
        --rollout-start-timeout 900
        --save "$train"
        --save-interval "$SAVE_INTERVAL"
        --save-total-limit 2
    )
    # shellcheck disable=SC2086 # several files
    set -- --prompt-data ${PROMPT_DATA:-none} "$@"
    # shellcheck disable=SC2206 # several files
    [ -z "$EVAL_DATA" ] || options+=(--eval-interval "$EVAL_INTERVAL" --eval-data $EVAL_DATA)
    [ "$TP" -eq 1 ] || options+=(--sequence-parallel)
    [ "$GPUS_PER_NODE" -eq 0 ] || options+=(--bf16)
    if [ "$ROLLOUT_GPUS" -gt 0 ]; then
        [ "$ROLLOUT_GPUS" -lt "$GPUS_PER_NODE" ] ||
            die "ROLLOUT_GPUS $ROLLOUT_GPUS leaves no GPU of GPUS_PER_NODE $GPUS_PER_NODE to the trainer"
        local devices
        devices=$(seq -s , $((GPUS_PER_NODE - ROLLOUT_GPUS)) $((GPUS_PER_NODE - 1)))
        options+=(--rollout-devices "$devices" --rollout-tensor-parallel-size "$ROLLOUT_TP")
        options+=(--rollout-gpu-memory-utilization 0.85)
    elif [ "$GPUS_PER_NODE" -gt 0 ]; then
        options+=(--rollout-gpu-memory-utilization 0.3 --rollout-sleep "$ROLLOUT_SLEEP")
    else
        options+=(--rollout-num-servers "$ROLLOUT_SERVERS")
    fi
    options+=("$@")

    # Where servers have GPUs of their own, fewer ranks run.
    if [ "$GPUS_PER_NODE" -gt 0 ]; then
        first_ranks=$((GPUS_PER_NODE - ROLLOUT_GPUS)) other_ranks=$GPUS_PER_NODE
        [ "$ROLLOUT_NODES" = first ] || other_ranks=$first_ranks
    else
        first_ranks=$RANKS_PER_NODE other_ranks=$RANKS_PER_NODE
    fi
    world_size=$((first_ranks + (NODES - 1) * other_ranks))
}

plan() {
    local model=()
    [ -n "$HF_CHECKPOINT" ] || model=(--model qwen2.5-math-7b)
    "$PYTHON" tools/plan.py "${model[@]}" --nodes "$NODES" --gpus-per-node "$GPUS_PER_NODE" \
        --ranks-per-node "$RANKS_PER_NODE" --gpu "$GPU" -- "${options[@]}"
}

require_inputs() {
    [ -n "$HF_CHECKPOINT" ] ||
        die "set HF_CHECKPOINT to the directory of Qwen2.5-Math-7B (or of another model) on a shared disk"
    [ -n "$PROMPT_DATA" ] || die "set PROMPT_DATA to a JSONL or .parquet file of prompts and answers"
}

# Step of the newest checkpoint, 0 without one.
saved_step() {
    local name=step_0
    [ ! -f "$train/checkpoints/latest" ] || read -r name <"$train/checkpoints/latest" || true
    printf '%d' "$((10#${name#step_}))"
}

# How a run goes on: from its checkpoint; or anew, over what an attempt of this job left that saved nothing.
resume_options() {
    if [ -n "$overwrite" ] && [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ]; then
        resume=(--overwrite)
    elif [ -f "$train/checkpoints/latest" ]; then
        resume=(--load "$train")
    elif [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
        resume=(--overwrite)
    else
        resume=()
    fi
}

submit() {
    require_inputs
    plan || die "the plan does not fit, nothing is submitted"
    command -v sbatch >/dev/null ||
        die "no sbatch here: run this on a SLURM cluster's login node, or --dry-run for the plan alone" 1
    resume_options
    WORLD_SIZE=$world_size "$PYTHON" pretrain_siren.py "${options[@]}" "${resume[@]}" --check || exit $?
    mkdir -p "$RUN_DIR/logs"
    export NODES GPUS_PER_NODE RANKS_PER_NODE ROLLOUT_GPUS ROLLOUT_NODES ROLLOUT_TP ROLLOUT_SERVERS
    export ROLLOUT_SLEEP GPU TP PP CP EP NUM_STEPS SAVE_INTERVAL RUN_DIR
    export MAX_REQUEUES HF_CHECKPOINT PROMPT_DATA EVAL_DATA EVAL_INTERVAL PYTHON SRUN_OPTIONS SIREN_REPOSITORY=$PWD
    local machines=(--nodes "$NODES" --ntasks-per-node 1)
    [ "$GPUS_PER_NODE" -eq 0 ] || machines+=(--exclusive)
    machines+=(--gpus-per-node "$GPUS_PER_NODE")
    local job
    # shellcheck disable=SC2086 # SBATCH_OPTIONS is several words
    job=$(sbatch --parsable --export=ALL "${machines[@]}" --time "$TIME_LIMIT" \
        --signal "B:USR1@$WARNING_SECONDS" --output "$RUN_DIR/logs/job-%j.out" $SBATCH_OPTIONS \
        "examples/run_siren_7b_tp4.sh" ${overwrite:+--overwrite} "$@")
    printf 'submitted: job %s; its output: %s/logs/job-%s.out; the run: %s\n' \
        "${job%%;*}" "$RUN_DIR" "${job%%;*}" "$train"
}

# Runs on every node, as the one task of srun there: torchrun, and the warning handed to its ranks.
# shellcheck disable=SC2016 # expanded on the node
node_main='
set -u
first_ranks=$1 other_ranks=$2 stop_file=$3 logs=$4
shift 4
# What SLURM may send to everything in the step is not for this shell: the ranks hear it by the file.
trap "" USR1
ranks=$other_ranks tee=()
if [ "$SLURM_NODEID" -eq 0 ]; then
    ranks=$first_ranks tee=(--role rank --tee 0:3)
fi
mkdir -p "$logs/node$SLURM_NODEID"
"$PYTHON" -m siren_megatron.launch --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" \
    --nproc-per-node "$ranks" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
    --log-dir "$logs/node$SLURM_NODEID" --redirects 3 "${tee[@]}" "$@" &
agent=$!
trap "kill -TERM $agent" TERM INT
while kill -0 "$agent" 2>/dev/null; do
    if [ -n "$stop_file" ] && [ -e "$stop_file" ]; then
        # It hands the signal to its ranks, which finish their step, save and end.
        kill -USR1 "$agent"
        stop_file=
    fi
    sleep 1 &
    wait -n "$agent" $! || true
done
wait "$agent"
'

# In the job: one torchrun a node; afterwards done, requeued, or failed.
run_job() {
    local attempt=${SLURM_JOB_ID}.${SLURM_RESTART_COUNT:-0} warned='' status=0 started_at=0 step host
    logs=$RUN_DIR/logs/$attempt
    mkdir -p "$logs"
    local stop_file=$logs/stop-requested
    trap 'warned=yes; touch "$stop_file"; echo "time limit ahead: the run saves and is requeued"' USR1
    require_inputs
    plan || die "the plan does not fit"
    resume_options
    WORLD_SIZE=$world_size "$PYTHON" pretrain_siren.py "${options[@]}" "${resume[@]}" --check || exit $?

    [ "${resume[*]}" = --overwrite ] || started_at=$(saved_step)
    host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_ADDR=$(scontrol show node -o "$host" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    : "${MASTER_ADDR:=$host}"
    # Below the range from which vLLM's port is taken, and another one for every job of a node.
    MASTER_PORT=$((10000 + SLURM_JOB_ID % 10000))
    export MASTER_ADDR MASTER_PORT PYTHON
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # ranks and vLLM share the cores: their pools would fight
    printf '%s attempt %s on %s from step %s, %s ranks, store at %s:%s, logs in %s\n' "$(date '+%F %T')" \
        "$attempt" "$SLURM_JOB_NODELIST" "$started_at" "$world_size" "$MASTER_ADDR" "$MASTER_PORT" "$logs"

    # shellcheck disable=SC2086 # SRUN_OPTIONS is several words
    srun --kill-on-bad-exit=1 --cpu-bind=none --ntasks-per-node=1 --nodes="$SLURM_JOB_NUM_NODES" $SRUN_OPTIONS \
        bash -c "$node_main" node "$first_ranks" "$other_ranks" "$stop_file" "$logs" \
        pretrain_siren.py "${options[@]}" "${resume[@]}" &
    step=$!
    trap 'kill -TERM $step 2>/dev/null || true' TERM INT
    trap 'kill -TERM $step 2>/dev/null || true' EXIT
    # A signal ends `wait`; the step's own status comes when it has ended.
    while true; do
        status=0
        wait "$step" || status=$?
        kill -0 "$step" 2>/dev/null || break
    done
    trap - EXIT
    finish "$status" "$warned" "$started_at" "$attempt"
}

# Requeue what is not finished, unless it would only repeat itself.
finish() {
    local status=$1 warned=$2 started_at=$3 attempt=$4 reached total history=$RUN_DIR/logs/attempts.txt
    reached=$(saved_step)
    total=$(value_of --num-steps "${options[@]}")
    local fruitless=0
    if [ -f "$history" ] && [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
        fruitless=$(tail -n 1 "$history" | awk -v job="$SLURM_JOB_ID." \
            'index($2, job) == 1 && $4 == $6 { print 1 }')
    fi
    printf 'attempt %s from %s to %s of %s status %s %s\n' \
        "$attempt" "$started_at" "$reached" "$total" "$status" "${warned:+warned}" >>"$history"
    if [ "$status" -eq 0 ] && [ "$reached" -ge "$total" ]; then
        echo "done: step $reached of $total"
        exit 0
    fi
    local state
    state=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p')
    if [ "$state" != RUNNING ]; then
        echo "stopped by SLURM ($state) at step $reached of $total"
        exit 1
    fi
    echo "the attempt ended with status $status at step $reached of $total (it began at $started_at)"
    if [ "$reached" -eq "$started_at" ] && [ "${fruitless:-0}" -eq 1 ]; then
        die "two attempts in a row saved no step: see $logs, or lower SAVE_INTERVAL" 1
    fi
    [ "${SLURM_RESTART_COUNT:-0}" -lt "$MAX_REQUEUES" ] || die "requeued MAX_REQUEUES $MAX_REQUEUES times" 1
    echo "requeued: the next attempt goes on from step $reached"
    scontrol requeue "$SLURM_JOB_ID" ||
        die "SLURM does not requeue this job: submit it again, it goes on from step $reached" 1
    # SLURM ends this script now; should it not, the job must not count as done.
    sleep 60
    exit 1
}

dry_run='' overwrite='' resume=() arguments=()
for argument in "$@"; do
    case "$argument" in
        -h | --help)
            usage
            exit 0
            ;;
        --dry-run) dry_run=yes ;;
        --overwrite) overwrite=yes ;; # of the first attempt only
        *) arguments+=("$argument") ;;
    esac
done
# In the job the machines are SLURM's word, whatever the variables say.
if [ -n "${SLURM_JOB_ID:-}" ] && [ -z "$dry_run" ]; then
    NODES=$SLURM_JOB_NUM_NODES
    if [ -n "${SLURM_GPUS_PER_NODE:-}" ]; then
        GPUS_PER_NODE=${SLURM_GPUS_PER_NODE##*:}
    fi
fi
prepare "${arguments[@]}"
if [ -n "$dry_run" ]; then
    plan
elif [ -n "${SLURM_JOB_ID:-}" ]; then
    run_job
else
    submit "${arguments[@]}"
fi
