#!/bin/bash
# SLURM: one job that starts a Ray cluster on its nodes and runs all rounds. sbatch deploy/ray/slurm.sh, in the project's
# folder, with runtime.cluster: auto in params.yaml, and cluster_storage: shared if all nodes have the folder.
#SBATCH --job-name=srpo
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail
export RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token # the token is in the home folder, which nodes share
ray get-auth-token --generate > /dev/null

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')
port=$((20000 + SLURM_JOB_ID % 10000)) # another job of yours may use the same node

srun --nodes=1 --ntasks=1 --overlap --nodelist="$head" \
    ray start --head --node-ip-address="$address" --port="$port" --include-dashboard=false --block &
sleep 20 # the others need a head
if ((SLURM_JOB_NUM_NODES > 1)); then
    srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --overlap --exclude="$head" \
        ray start --address="$address:$port" --block &
fi

# this script runs on the first node
RAY_ADDRESS="$address:$port" dvc repro
