"""Which predictor should CNN-JEPA have? The paper's ten (table III) and a pointwise one.

python sweeps/predictor_ablation.py --cluster local                22 runs: 6 min on two cores
python sweeps/predictor_ablation.py --cluster local --scale paper  33 runs of about 52 GPU-hours

Expected at paper scale (one seed, best of 90 probe epochs): linear 73.26 at depth 3, k-NN 59.22 at
depth 2; depth 1 clearly worse; kernel size within a point. Smoke scale only shows that it works.
"""

from sweeps.cli.run import main
from sweeps.spec.scales import PAPER, SMOKE
from sweeps.spec.space import Value
from sweeps.spec.sweep import Configuration, Scale, SweepSpec


def _configuration(linear: float | None = None, knn: float | None = None, **predictor: Value) -> Configuration:
    paper = {"linear.paper_protocol_top1": linear, "knn.test_top1": knn}
    return Configuration({f"method.predictor.{k}": v for k, v in predictor.items()}, {k: v for k, v in paper.items() if v is not None})


SWEEP = SweepSpec(
    name="predictor_ablation",
    question="Which predictor should CNN-JEPA have: how deep, how wide a kernel, and does it need depthwise or dense convolution?",
    configurations=[
        _configuration(64.86, 51.84, conv="depthwise", depth=1, kernel=3),
        _configuration(73.22, 59.22, conv="depthwise", depth=2, kernel=3),
        _configuration(73.26, 56.26, conv="depthwise", depth=3, kernel=3),
        _configuration(71.72, 53.84, conv="depthwise", depth=4, kernel=3),
        _configuration(71.14, 50.94, conv="depthwise", depth=5, kernel=3),
        _configuration(69.24, 47.68, conv="depthwise", depth=6, kernel=3),
        _configuration(73.08, conv="depthwise", depth=3, kernel=5),
        _configuration(72.44, conv="depthwise", depth=3, kernel=7),
        _configuration(73.16, conv="depthwise", depth=3, kernel=9),
        _configuration(72.64, 54.76, conv="dense", depth=3, kernel=3),
        _configuration(conv="pointwise", depth=3),
    ],
    smoke=Scale([*SMOKE, "epochs=8", "method.ema.momentum_start=0.97"], seeds=2),
    paper=Scale(PAPER, seeds=3),
)

if __name__ == "__main__":
    main(SWEEP)
