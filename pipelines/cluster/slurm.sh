#!/bin/bash
# Annotate with a Slurm array: every task takes its slice of the shards, all write into one store on a shared file
# system. A task that is requeued goes on where it stopped; another number of tasks later does no harm, either.
#
#     sbatch --array=0-15 slurm.sh SHARDS TEACHER STORE
#
#SBATCH --job-name=annotate
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@60
#SBATCH --output=annotate-%A-%a.log
set -euo pipefail
shards=$1 teacher=$2 store=$3

exec srun pseudolabel annotate "$shards" --teacher "$teacher" --out "$store" --encoding topk:10 \
    --slice "$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))/$SLURM_ARRAY_TASK_COUNT"
