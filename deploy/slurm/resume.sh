# Sourced by the batch scripts here: what they have in common.

. .venv/bin/activate
export RAY_USAGE_STATS_ENABLED=0 HF_HUB_OFFLINE=1  # compute nodes without the internet
# Of each of a hundred thousand ended actors Ray's head would keep some 20 kB.
export RAY_maximum_gcs_destroyed_actor_cached_count=2000 RAY_maximum_gcs_dead_worker_cached_count=2000
export RAY_task_events_max_num_task_in_gcs=10000
# Ray's sockets need a short path, and users of one node must not meet in /tmp/ray.
export RAY_TMPDIR=/tmp/ray-$USER-$SLURM_JOB_ID

# Runs a command until it ends. When time is nearly up (USR1) it is told to save and end, and the job is put into the
# queue again, under the same id; at USR2 it is told the same, and the job ends. Its status is the command's.
until_time_is_up() {
    local again= status
    "$@" &
    local pid=$!
    trap 'again=yes; kill -TERM $pid' USR1
    trap 'kill -TERM $pid' USR2
    trap 'again=' TERM # of scancel, which tells the command itself: to be told twice would end it without saving
    while wait $pid; status=$?; kill -0 $pid 2>/dev/null; do :; done # a signal ends the waiting alone
    trap '' USR1 USR2 TERM
    # 143: it has saved and ended at the signal. Anything else would only happen again.
    if [ -n "$again" ] && [ $status = 143 ]; then
        echo "time is up: into the queue again"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return $status
}
