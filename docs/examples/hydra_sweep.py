"""Which learning rate for a program that Hydra configures?"""

from sweeps import Configuration, SweepSpec, main

COMMAND = ["python", "hydra_digits.py", "optimizer.lr={lr}", "epochs={epochs}", "seed={seed}", "hydra.run.dir={run_dir}"]
RATES = [Configuration({"lr": 0.01}), Configuration({"lr": 0.1})]
SWEEP = SweepSpec(command=COMMAND, configurations=RATES, defaults={"epochs": 6}, files=["conf"], objective="accuracy", unit="%")

if __name__ == "__main__":
    main(SWEEP)
