#!/bin/bash

# Parameters
#SBATCH --account=abc
#SBATCH --array=0-32%1
#SBATCH --cpus-per-task=16
#SBATCH --gres=gpu:4
#SBATCH --job-name=sweep-1
#SBATCH --mem=256000M
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output=/runs/log/%A_%a.log
#SBATCH --partition=test
#SBATCH --requeue
#SBATCH --signal=USR2@180
#SBATCH --time=60

# setup
export NCCL_DEBUG=WARN
export OMP_NUM_THREADS=16
export PYTHONPATH=/runs/code/1${PYTHONPATH:+:$PYTHONPATH}
cd /runs/code/1 || exit 1

# command
export SUBMITIT_EXECUTOR=slurm
/venv/bin/python -u -m jobs.slurm.supervisor --stop-signal-seconds 180 -- \
    srun --unbuffered --kill-on-bad-exit=1 --cpus-per-task=16 \
    /venv/bin/python -u -m sweeps.execution.worker_main /runs/submissions/000001.json
