#!/bin/bash
# A training on one node: sbatch deploy/slurm/one-node.sh vits14 --data.catalog … --run.out … --train.ranks 4
#SBATCH --job-name=tilestream
#SBATCH --nodes=1 --ntasks=1 --exclusive
#SBATCH --time=24:00:00
# Five minutes before its time is up the training saves, and the job is queued again; so it is when its node dies.
#SBATCH --signal=B:USR1@300 --requeue
#SBATCH --output=%x-%j.log --open-mode=append

. deploy/slurm/resume.sh
mkdir -p "$RAY_TMPDIR" && trap 'rm -rf "$RAY_TMPDIR"' EXIT
until_time_is_up tilestream train "$@"
