#!/bin/bash
# One alignment a task, of seeds 0 to 4: sbatch configs/slurm_array.sh MODEL PAIRS DIR
#SBATCH --job-name=allo
#SBATCH --array=0-4
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
set -euo pipefail
seed=$SLURM_ARRAY_TASK_ID
# Tasks on one node must not meet at one port. A task that was stopped goes on from its checkpoints.
accelerate launch --config_file configs/fsdp2.yaml --main_process_port $((29500 + seed)) \
  -m allo_lib align --model "$1" --pairs "$2" --out "$3/seed-$seed" seed="$seed"
