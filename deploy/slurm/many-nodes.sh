#!/bin/bash
# A training on many nodes: ranks on the first group of nodes, of a GPU partition, readers on the second one.
#   sbatch deploy/slurm/many-nodes.sh vits14 --data.catalog … --run.out … --train.ranks 8 --data.readers [8,64]
# Without the lines from `hetjob` on it has one group, whose nodes take both.
#SBATCH --job-name=tilestream
#SBATCH --partition=gpu --nodes=2 --ntasks-per-node=1 --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300 --requeue
#SBATCH --output=%x-%j.log --open-mode=append
#SBATCH hetjob
#SBATCH --partition=cpu --nodes=4 --ntasks-per-node=1 --exclusive

. deploy/slurm/resume.sh
# Its own nodes end before it does: the job that is queued again wants the port. (They are in this script's group.)
trap 'trap "" TERM; kill 0; wait' EXIT
# A cluster of this job alone: its port is below those that the kernel gives to anybody, its token is new.
port=$((12000 + SLURM_JOB_ID % 20000))
RAY_AUTH_TOKEN=$(openssl rand -hex 32)
address=$(python -c 'import ray.util; print(ray.util.get_node_ip_address())') # a host's name may mean its loopback
export RAY_ADDRESS=$address:$port RAY_AUTH_MODE=token RAY_AUTH_TOKEN

# What runs on each node until the job ends. Workers take any free port, where nodes are shared by several jobs.
# Ray gives a node half a minute to start, which is too short where it is busy or its file system slow: hence tries.
node() {
    mkdir -p "$RAY_TMPDIR" && trap 'rm -rf "$RAY_TMPDIR"' EXIT
    local options="--num-cpus $SLURM_CPUS_ON_NODE --min-worker-port 0 --max-worker-port 0"
    until ray start --block $options "$@"; do sleep 10; done
}
export -f node

node --head --port "$port" --include-dashboard false --labels tilestream-role=trainer &
# Not `ray health-check`, which is content where the node itself has not come up yet.
timeout 600 bash -c 'until python -c "import ray; ray.init()"; do sleep 2; done' 2>/dev/null || exit 1
group= roles=
nodes=$SLURM_JOB_NUM_NODES
if [ -n "$SLURM_HET_SIZE" ]; then
    group=--het-group=0 nodes=$SLURM_JOB_NUM_NODES_HET_GROUP_0
    roles="--data.reader_labels.tilestream-role reader --train.rank_labels.tilestream-role trainer"
    srun --het-group=1 --ntasks-per-node=1 bash -c 'node --address "$RAY_ADDRESS" --labels tilestream-role=reader' &
fi
if [ "$nodes" -gt 1 ]; then
    srun $group --nodes=$((nodes - 1)) --ntasks=$((nodes - 1)) --ntasks-per-node=1 --exclude="$SLURMD_NODENAME" \
        bash -c 'node --address "$RAY_ADDRESS" --labels tilestream-role=trainer' &
fi
# Nodes are used as they join; with the last line's end the job ends, and all of them with it.
until_time_is_up tilestream train "$@" $roles
