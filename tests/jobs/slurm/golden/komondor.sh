#!/bin/bash

# Parameters
#SBATCH --account=abc
#SBATCH --array=0-32%8
#SBATCH --cpus-per-task=16
#SBATCH --export=PATH,HOME,USER,LOGNAME,SHELL,LANG,PYTHONPATH,VIRTUAL_ENV,CONDA_PREFIX,LD_LIBRARY_PATH,CUDA_HOME,BASH_ENV,BASH_FUNC_module%%,BASH_FUNC_ml%%,MODULEPATH,MODULESHOME,MODULES_CMD,LOADEDMODULES,_LMFILES_,LMOD_CMD,LMOD_DIR,LMOD_PKG,LMOD_ROOT,LMOD_SETTARG_FULL_SUPPORT,LMOD_SYSTEM_DEFAULT_MODULES,http_proxy,https_proxy,all_proxy,no_proxy,HTTP_PROXY,HTTPS_PROXY,ALL_PROXY,NO_PROXY,SSL_CERT_FILE,SSL_CERT_DIR,REQUESTS_CA_BUNDLE,XDG_CACHE_HOME,TORCH_HOME
#SBATCH --gres=gpu:4
#SBATCH --job-name=sweep-1
#SBATCH --mem=256000M
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output=/runs/log/%A_%a.log
#SBATCH --partition=gpu
#SBATCH --qos=normal
#SBATCH --requeue
#SBATCH --signal=USR2@300
#SBATCH --time=960

# setup
export SLURM_EXPORT_ENV=ALL
export NCCL_DEBUG=WARN
export OMP_NUM_THREADS=16
export PYTHONPATH=/runs/code/1${PYTHONPATH:+:$PYTHONPATH}
cd /runs/code/1 || exit 1

# command
export SUBMITIT_EXECUTOR=slurm
/venv/bin/python -u -m jobs.slurm.supervisor --stop-signal-seconds 300 -- \
    srun --unbuffered --kill-on-bad-exit=1 --cpus-per-task=16 \
    /venv/bin/python -u -m sweeps.execution.worker_main /runs/submissions/000001.json
