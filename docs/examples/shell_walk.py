"""Which step for a random walk to a minimum? A program in bash."""

from sweeps import Configuration, Scale, SweepSpec, main

SWEEP = SweepSpec(
    command=["bash", "walk.sh", "{step}", "{seed}", "{epochs}", "{run_dir}"],
    configurations=[Configuration({"step": 20}), Configuration({"step": 200})],
    defaults={"epochs": 12},
    objective="distance",
    direction="minimize",
    paper=Scale([], seeds=2),
)

if __name__ == "__main__":
    main(SWEEP)
