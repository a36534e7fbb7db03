"""Place the names of points in a figure so that none covers another."""

from collections.abc import Mapping, Sequence
from typing import Any

# Of the plot on a phone, in pixels: names that have room there have room on any screen.
_WIDTH, _HEIGHT = 290.0, 270.0
_OF_A_LETTER, _OF_A_LINE, _APART = 6.2, 14.0, 7.0
Box = tuple[float, float, float, float]  # left, top, right, bottom
Axes = tuple[float, float, float, float]  # from x to x, from y to y


def placed(
    points: Mapping[str, tuple[float, float]], texts: Mapping[str, str], axes: Axes, crowd: Sequence[tuple[float, float]]
) -> list[dict[str, Any]]:
    """Return an annotation for each point whose text has room, the first points first.

    `points` are name -> (x, y), and `crowd` all points that no text may cover. A text stands beside
    its point, at one of four corners.
    """
    taken = [_around(_pixel(point, axes), 4.0) for point in crowd]
    found = []
    for name, point in points.items():
        (x, y), lines = _pixel(point, axes), texts[name].split("<br>")
        wide, tall = _OF_A_LETTER * max(map(len, lines)), _OF_A_LINE * len(lines)
        for xanchor, yanchor in (("right", "bottom"), ("left", "bottom"), ("right", "top"), ("left", "top")):
            x0 = x - _APART - wide if xanchor == "right" else x + _APART
            y0 = y - _APART - tall if yanchor == "bottom" else y + _APART
            box = (x0, y0, x0 + wide, y0 + tall)
            inside = box[0] >= -4 and box[2] <= _WIDTH + 4 and box[1] >= -4 and box[3] <= _HEIGHT + 4
            if inside and not any(_meet(box, other) for other in taken):
                taken.append(box)
                shift = {"xshift": -_APART if xanchor == "right" else _APART, "yshift": _APART if yanchor == "bottom" else -_APART}
                at = {"x": point[0], "y": point[1], "xanchor": xanchor, "yanchor": yanchor}
                found.append({**at, **shift, "text": texts[name], "showarrow": False, "font": {"size": 11}})
                break
    return found


def _pixel(point: tuple[float, float], axes: Axes) -> tuple[float, float]:
    """Return where a point is drawn on a phone, from the upper left corner of the plot."""
    left, right, low, high = axes
    return (point[0] - left) / (right - left) * _WIDTH, (high - point[1]) / (high - low) * _HEIGHT


def _around(pixel: tuple[float, float], half: float) -> Box:
    return pixel[0] - half, pixel[1] - half, pixel[0] + half, pixel[1] + half


def _meet(one: Box, other: Box) -> bool:
    """Return whether two boxes (left, top, right, bottom) overlap."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def span(values: Sequence[float], share: float = 0.08) -> tuple[float, float]:
    """Return a range of an axis around `values`, with some room at both ends."""
    low, high = min(values), max(values)
    room = share * (high - low) or abs(high) * share or 1.0
    return low - room, high + room
