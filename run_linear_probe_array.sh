#!/bin/bash
# Evaluate an encoder by five methods on a Slurm cluster, a method a task.
#
#   sbatch run_linear_probe_array.sh --encoder runs/galaxy10           all five
#   sbatch --array=4 run_linear_probe_array.sh --encoder runs/galaxy10 one of them
#   job=$(sbatch --parsable run_ssl) && sbatch --dependency=afterok:$job --kill-on-invalid-dep=yes \
#       run_linear_probe_array.sh --encoder runs/galaxy10              after a pre-training
#
# Flags are those of linear_probe_checkpoints.py. Each task ends by writing the report of what is there, so that the
# last one's is complete, however many failed. Logs, requeue and environment: as for run_ssl.

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
[[ -n ${SLURM_JOB_ID:-} ]] || { echo "$name: error: submit it: sbatch $name" >&2; exit 2; }
repo=$(timeout 60 scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p' | head -n 1)
repo=${repo%%/"$name"*}
[[ -f $repo/slurm/job.sh ]] || repo=$SLURM_SUBMIT_DIR
# shellcheck source=slurm/job.sh
source "$repo/slurm/job.sh" || exit 2
open_log
find_python

run_preemptible "$python" "$repo/linear_probe_checkpoints.py" "$@"
status=$?
"$python" "$repo/linear_probe_checkpoints.py" "$@" --report
exit "$status"
