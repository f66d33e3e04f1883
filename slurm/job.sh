# shellcheck shell=bash
# The common part of run_ssl, run_survey and run_linear_probe_array.sh. It opens the job's log, sets $repo and $python,
# and defines run_preemptible.
: "${name:?is set by the scripts that source this file}"

# If your cluster provides Python as a module, name the module here, for example MODULE=python/3.11. A virtual
# environment is used before the module's Python: $VENV, or else .venv beside main.py.
MODULE=${MODULE:-}

if [[ -z ${SLURM_JOB_ID:-} ]]; then
    echo "$name: error: submit it: sbatch $name" >&2
    exit 2
fi
repo=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID} # 12, or 12_3 in an array
exit_requeue=75                                                                        # EXIT_REQUEUE of preemption.py

fail() {
    echo "$name: error: $*" >&2
    exit 2
}

# Write to logs/NAME-JOB.out in the folder of submission, unless sbatch was given -o. This is not done by #SBATCH
# --output because Slurm does not create folders: the job would fail without any message.
open_log() {
    [[ $(readlink "/proc/$$/fd/1") == /dev/null ]] || return 0
    mkdir -p logs || exit 2
    local LC_ALL=C log=${SLURM_JOB_NAME//\//_} # which may hold slashes, and more bytes than a name of a file
    exec >>"logs/${log:0:200}-$job.out" 2>&1 || exit 2
    echo "--- $(date '+%F %T') job $job on $SLURM_JOB_NODELIST, attempt $((${SLURM_RESTART_COUNT:-0} + 1))"
}

# Set $python.
find_python() {
    if [[ -n $MODULE ]]; then
        module load "$MODULE" || fail "module load $MODULE failed; correct MODULE in $repo/slurm/job.sh"
    fi
    if [[ -n ${VENV:-} ]]; then
        python=$VENV/bin/python
        [[ -x $python ]] || fail "VENV=$VENV: no virtual environment there; create it: python3 -m venv '$VENV'"
    elif [[ -x $repo/.venv/bin/python ]]; then
        python=$repo/.venv/bin/python
    elif [[ -n $MODULE ]]; then
        python=$(command -v python3) || fail "module $MODULE has no python3; correct MODULE in $repo/slurm/job.sh"
    else
        fail "no Python environment: create $repo/.venv as the README says, or set VENV or MODULE"
    fi
}

# Run a command. If it is interrupted by a signal or a preemption, or killed, requeue the job. Otherwise return the
# command's exit status.
run_preemptible() {
    local child status signalled=
    printf 'running:'
    printf ' %q' "$@"
    printf '\n'
    # In the background, because bash runs a trap only after the foreground command has ended.
    "$@" &
    child=$!
    trap 'signalled=1; trap "" USR1 TERM; forward_signal "$child" &' USR1 TERM # Slurm may signal more than once
    wait "$child"
    status=$?
    if [[ -n $signalled ]]; then # the signal ended the wait, not the command
        wait "$child"
        status=$?
    fi
    trap '' USR1 TERM
    if [[ $status == 0 || $status == 2 || ${SLURM_RESTART_COUNT:-0} -ge 100 ]]; then
        return "$status" # success, an error that the user must fix, or too many restarts
    elif [[ -n $signalled || $status == "$exit_requeue" || $status == 138 || $status == 143 ]] || being_preempted; then
        requeue "stopped by a signal" # sent to this shell, or to the job step alone: 128 + USR1, 128 + TERM
    elif [[ $status == 137 && ${SLURM_RESTART_COUNT:-0} -lt 10 ]]; then # if it repeats, memory may be too small
        requeue "killed (status 137)"
    fi
    return "$status"
}

# Send USR1 to a process until it ends. A process that is still starting ignores the first signals.
forward_signal() {
    while kill -USR1 "$1" 2>/dev/null; do sleep 10; done
}

# Whether the job is being preempted. Slurm may signal the job's steps without this shell, and torchrun exits with
# status 1 when its workers were stopped by a signal.
being_preempted() {
    [[ $(show_job) =~ PreemptTime=[0-9] ]]
}

# Print Slurm's record of this job. Retried for up to three minutes if the controller does not answer.
show_job() {
    local attempt
    for attempt in 1 2 3 4 5; do
        timeout 30 scontrol show job "$job" && return
        sleep "$attempt"
    done
}

requeue() {
    local answer attempt state
    state=$(show_job | grep -o 'JobState=[A-Z]*' | head -n 1)
    if [[ -n $state && $state != JobState=RUNNING ]]; then
        echo "$1; Slurm is already ending or requeueing the job (state ${state#*=})"
        return
    fi
    echo "$1; requeueing the job"
    trap - USR1 TERM # a requeue ends this shell by TERM
    for attempt in 1 2 3 4 5; do
        answer=$(timeout 30 scontrol requeue "$job" 2>&1) && sleep 60 # wait for TERM: an exit would complete the job
        sleep "$attempt"
    done
    echo "requeueing failed ($answer); submit the same command again to resume"
}

open_log
find_python
