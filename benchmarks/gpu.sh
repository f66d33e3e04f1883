#!/usr/bin/env bash
# Every measurement of this project on a GPU, on real galaxies, without a network:
#
#   bash benchmarks/gpu.sh galaxies.parquet OUT           status 0: finished; 75: out of time, repeat the same command
#   SHORT=1 bash benchmarks/gpu.sh galaxies.parquet OUT   the same stages in a minute, on a CPU as well
#
# What is wanted first comes first: the step by its parts on synthetic pixels (gpu_step.py, eight minutes), 300 steps of
# main.py, and the baseline (run_mae.py) once. Then all paths three times, the effect of single choices, a 400-epoch
# pre-training and the five methods with three seeds. A call takes at most $LIMIT seconds (540). It then stops at a
# checkpoint or after the last complete measurement, and the next call resumes there.
set -euo pipefail
if (($# != 2)); then
    echo "usage: bash benchmarks/gpu.sh DATA OUT" >&2
    exit 2
fi
data=$1 out=$2
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
end=$((SECONDS + ${LIMIT:-540}))
mkdir -p "$out"

pretraining=(--dataset "$data") throughput=(--workers 4 16 --steps 60) evaluation=(--dataset "$data")
step=() steps=300 baseline=(--steps 60) workers=16 bf16=true
variants=(--steps 20)
if [[ -n ${SHORT:-} ]]; then
    small=(--config "$here/recipes/demo.yaml" --dataset "$data" --image_size 32 --num_hidden_layers 2 --batch_size 32)
    pretraining=("${small[@]}" --num_train_epochs 1) step=("${small[@]}" --steps 2)
    steps=3 baseline=("${small[@]}" --steps 2) workers=1 bf16=false
    throughput=("${small[@]}" --workers 1 --steps 2 --repeats 1)
    variants=("${small[@]}" --variants eager --steps 1 --repeats 1)
    evaluation=(--config "$here/recipes/evaluation_demo.yaml" --dataset "$data" --num_train_epochs 1 --batch_size 32)
fi

# A stage is a name and a command. Its output goes to OUT/NAME.log, and a finished stage is skipped.
stage() {
    local name=$1 status=0
    shift
    [[ -e $out/$name.done ]] && return
    local left=$((end - SECONDS))
    if ((left < 20)); then
        echo "out of time before $name: repeat the same command"
        exit 75
    fi
    echo "$name ($left s left)"
    # At USR1 main.py and linear_probe_checkpoints.py save and exit with 75. gpu_step.py, pretrain.py and variants.py keep
    # every finished measurement. The others are short and start again.
    timeout --signal=USR1 --kill-after=60 "$left" "$@" >>"$out/$name.log" 2>&1 || status=$?
    case $status in
    0) touch "$out/$name.done" ;;
    75 | 124 | 137 | 138)
        echo "out of time in $name: repeat the same command"
        exit 75
        ;;
    *)
        tail -n 5 "$out/$name.log" >&2
        exit "$status"
        ;;
    esac
}

stage step "$python" "$here/benchmarks/gpu_step.py" "$out/step.jsonl" --seconds $((end - SECONDS - 30)) "${step[@]}"
stage steps "$python" "$here/main.py" "${pretraining[@]}" --max_steps "$steps" --output_dir "$out/steps" --report_to none
stage baseline "$python" "$here/benchmarks/pretrain.py" --dataset "$data" "${baseline[@]}" \
    --measure "{\"path\": \"baseline (run_mae.py)\", \"workers\": $workers, \"bf16\": $bf16}"
stage throughput "$python" "$here/benchmarks/pretrain.py" --dataset "$data" \
    --results "$out/throughput.jsonl" "${throughput[@]}"
stage variants "$python" "$here/benchmarks/variants.py" --dataset "$data" \
    --results "$out/variants.jsonl" "${variants[@]}"
stage pretraining "$python" "$here/main.py" "${pretraining[@]}" --output_dir "$out/run" --report_to none
stage evaluation "$python" "$here/linear_probe_checkpoints.py" --encoder "$out/run" "${evaluation[@]}" \
    --output_dir "$out/results" --report_to none
cat "$out"/{step,baseline,throughput,variants}.log "$out/results/report.md"
