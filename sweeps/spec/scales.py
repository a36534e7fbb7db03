"""Overrides that the sweeps share: a small ResNet on digits, and the paper's experiment."""

SMOKE = [
    "data=digits",
    "encoder.name=resnet_small",
    "epochs=12",
    "global_batch_size=64",
    "micro_batch_size=64",
    "optimizer.warmup_epochs=1",
    "checkpoint.every_minutes=0.1",
]
# The paper's runs had 201 epochs. Its authors link Kaggle's ImageNet-100.
PAPER = ["data=imagenet100_kaggle", "encoder.name=resnet50", "precision=bf16", "epochs=201"]
