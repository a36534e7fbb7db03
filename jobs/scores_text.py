"""Scores as lines for a terminal, each with what it rests on: its images, its draws, and its spread."""

from collections.abc import Mapping

from jobs.task import Task


def score_lines(task: Task, metrics: Mapping[str, float], images: Mapping[str, int], note: str = "") -> list[str]:
    """Return '  knn.test_top1 = 51.39 ± 2.63 (360 images)' and so on; `note` follows each.

    The figure after ± is the standard deviation over draws of the labelled images where there are
    draws, and top-1 alone has one. Elsewhere it is the standard error that the choice of the tested
    images gives.
    """
    lines = []
    for name, value in metrics.items():
        start = name.removesuffix("_top1")
        beginning = name.rpartition(".")[0]
        draws = metrics.get(f"{beginning}.draws")
        has_spread = any(other.startswith(f"{beginning}.") and other.endswith("_spread") for other in metrics)
        if has_spread and (name.endswith(".draws") or f"{name.removesuffix('_spread')}_top1" in metrics):
            continue  # shown with the score
        text = f"  {name} = {value:,.0f}" if name.endswith("_images") else f"  {name} = {value:.2f}"
        if (spread := metrics.get(f"{start}_spread")) is not None and name.endswith("_top1"):
            text += f" ± {spread:.2f} over {draws:.0f} draws" if draws else f" ± {spread:.2f}"
        elif name in images and draws is None and (error := task.sampling_error(value, images[name])) is not None:
            text += f" ± {error:.2f}"
        lines.append(text + (f" ({images[name]:,} images)" if name in images else "") + note)
    return lines
