# shellcheck shell=bash
# What run_ssl and run_linear_probe_array.sh have in common. They source it inside their job, after setting $repo.
: "${repo:?is set by the wrappers}"

# The one place to name your cluster's module that brings Python, if there is no virtual environment, as in
# MODULE=python/3.11. Without it the environment is $VENV, or .venv beside main.py.
MODULE=${MODULE:-}

job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID} # 12, or 12_3 of an array
start_again=75                                                                         # galaxy_mae/preemption.py

fail() {
    echo "$SLURM_JOB_NAME: error: $*" >&2
    exit 2
}

# Write to logs/NAME-JOB.out where the job was submitted, unless sbatch was told where to by -o. Slurm itself makes no
# folders: it would end a job whose log's folder is missing, and tell nobody.
open_log() {
    [[ $(readlink "/proc/$$/fd/1") == /dev/null ]] || return 0
    mkdir -p logs || exit 2
    exec >>"logs/$SLURM_JOB_NAME-$job.out" 2>&1
    echo "--- $(date '+%F %T') job $job on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1))"
}

# Set $python.
find_python() {
    local place
    if [[ -n $MODULE ]]; then
        module load "$MODULE" || fail "module load $MODULE failed; correct MODULE in $repo/slurm/job.sh"
    fi
    if [[ -n ${VENV:-} ]]; then
        place="$VENV/bin/python"
        [[ -x $place ]] || fail "VENV=$VENV: no environment there; correct it, or make one: python3 -m venv '$VENV'"
    elif [[ -x $repo/.venv/bin/python ]]; then
        place=$repo/.venv/bin/python
    elif [[ -n $MODULE ]]; then
        place=$(command -v python3) || fail "module $MODULE brings no python3; correct MODULE in $repo/slurm/job.sh"
    else
        fail "no environment: there is no $repo/.venv, and neither VENV nor MODULE is set; make one as the README says"
    fi
    # shellcheck disable=SC2034 # the wrappers use it
    python=$place
}

# Run a command until it ends or the job must go; then have the job put back into the queue, where it goes on later.
# Returns the command's status where the job is over.
run_preemptible() {
    local child status signalled=
    printf 'running:'
    printf ' %q' "$@"
    printf '\n'
    # In the background, because bash answers a signal only when its foreground command has ended.
    "$@" &
    child=$!
    trap 'signalled=1; trap "" USR1 TERM; pass_on "$child" &' USR1 TERM # Slurm may signal more than once
    wait "$child"
    status=$?
    if [[ -n $signalled ]]; then # that wait was ended by the signal
        wait "$child"
        status=$?
    fi
    trap '' USR1 TERM
    if [[ $status == 0 || $status == 2 || ${SLURM_RESTART_COUNT:-0} -ge 100 ]]; then
        return "$status" # done; or something that the user must mend; or no end in sight
    elif [[ -n $signalled || $status == "$start_again" || $status == 138 || $status == 143 ]] || being_preempted; then
        requeue "stopped by a signal" # the shell's, or one that only the job's step was sent: 128 + USR1, 128 + TERM
    elif [[ $status == 137 && ${SLURM_RESTART_COUNT:-0} -lt 10 ]]; then # more than once is perhaps too little memory
        requeue "killed (status 137)"
    fi
    return "$status"
}

# Tell a process that the job must go; again and again, for one that is still starting does not listen yet.
pass_on() {
    while kill -USR1 "$1" 2>/dev/null; do sleep 10; done
}

# Whether Slurm has told the job's steps, but not this shell, to go. torchrun's status does not say why its processes
# left: it is 1 also where they were told to.
being_preempted() {
    [[ $(show_job) =~ PreemptTime=[0-9] ]]
}

# What Slurm knows of this job; asked again for a minute or two if its controller does not answer.
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
        echo "$1: Slurm has already decided what becomes of the job (${state#*=})" # scancel, or a requeue of its own
        return
    fi
    echo "$1: back into the queue"
    trap - USR1 TERM # Slurm now ends this shell, by TERM
    for attempt in 1 2 3 4 5; do
        answer=$(timeout 30 scontrol requeue "$job" 2>&1) && sleep 60 # until then: who exits by himself has completed
        sleep "$attempt"
    done
    echo "not requeued ($answer); type the same sbatch command again to go on"
}
