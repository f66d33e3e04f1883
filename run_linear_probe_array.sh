#!/bin/bash
# Evaluate a pre-trained encoder by five methods on a Slurm cluster, one method per array task.
#
#   sbatch run_linear_probe_array.sh --encoder runs/galaxy10              all five methods
#   sbatch --array=4 run_linear_probe_array.sh --encoder runs/galaxy10    one of them
#
# Start it when a pre-training has completed:
#
#   job=$(sbatch --parsable run_ssl)
#   sbatch --dependency=afterok:$job --kill-on-invalid-dep=yes run_linear_probe_array.sh --encoder runs/galaxy10
#
# Flags are those of linear_probe_checkpoints.py. Each task ends by writing the report of all results so far, so the
# report of the last task is complete even if other tasks failed. The log is logs/linear_probe-JOB_TASK.out. Requeueing
# and the Python environment are as for run_ssl.

#SBATCH --job-name=linear_probe
#SBATCH --array=0-4
#SBATCH --partition=gpu
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --mem=32G
#SBATCH --time=12:00:00
#SBATCH --output=/dev/null
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -u
name=run_linear_probe_array.sh
# Slurm runs a copy of this script. The job's record has the original's path, except when it was submitted from a pipe.
original=$(timeout 60 scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null | grep -oPm 1 "^ *Command=\K.*?/$name(?= |$)")
for script in "$original" "$0" "${SLURM_SUBMIT_DIR:-.}/$name"; do
    common=$(dirname "$(readlink -m "$script")")/slurm/job.sh
    [[ -f $common ]] && break
done
if [[ ! -f $common ]]; then
    echo "$name: error: repository not found; submit it as sbatch PATH_OF_THE_CLONE/$name" |
        tee -a "${SLURM_SUBMIT_DIR:-.}/$name-${SLURM_JOB_ID:-}.out" >&2
    exit 2
fi
# shellcheck source=slurm/job.sh
source "$common"

run_preemptible "$python" "$repo/linear_probe_checkpoints.py" "$@"
status=$?
# A finished method has written the report. A failed one is shown in it; an interrupted one will be repeated.
if [[ $status != 0 && $status -lt 128 && $status != "$exit_requeue" ]]; then
    "$python" "$repo/linear_probe_checkpoints.py" "$@" --report
fi
exit "$status"
