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
# Slurm runs a copy of this file. It knows where the original lies, unless that was read from a pipe.
script=$(timeout 60 scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p' | head -n 1)
for place in "${script%/"$name"*}" "${script%%/"$name"*}" "$SLURM_SUBMIT_DIR"; do # arguments may follow, too
    repo=$(dirname "$(readlink -f "$place/$name")")
    [[ -f $repo/slurm/job.sh ]] && break
done
if [[ ! -f $repo/slurm/job.sh ]]; then
    echo "$name: error: the repository is not found from ${script:-here}: sbatch PATH_OF_THE_CLONE/$name" |
        tee -a "$SLURM_SUBMIT_DIR/$name-$SLURM_JOB_ID.out" >&2
    exit 2
fi
# shellcheck source=slurm/job.sh
source "$repo/slurm/job.sh" || exit 2
open_log
find_python

run_preemptible "$python" "$repo/linear_probe_checkpoints.py" "$@"
status=$?
if [[ $status -lt 128 && $status != "$start_again" ]]; then # else it was stopped and goes on later
    "$python" "$repo/linear_probe_checkpoints.py" "$@" --report
fi
exit "$status"
