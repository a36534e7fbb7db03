"""Which step for a random walk to a minimum? A program in bash."""

from sweeps import Configuration, SweepSpec, main

COMMAND = ["bash", "walk.sh", "{step}", "{seed}", "{epochs}", "{run_dir}"]
STEPS = [Configuration({"step": 20}), Configuration({"step": 200})]
SWEEP = SweepSpec(command=COMMAND, configurations=STEPS, defaults={"epochs": 12}, objective="distance", direction="minimize")

if __name__ == "__main__":
    main(SWEEP)
