"""WHERE and how a run happens: this machine, torchrun, Slurm, Hydra."""
