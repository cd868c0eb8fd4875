"""Names beside points, none over another name or point."""

from __future__ import annotations

import math
from collections.abc import Sequence

_RADII = (9, 16, 24, 34, 46, 60, 76, 94, 114, 136, 160, 190)  # points of the page
_DIRECTIONS = 24
_POINT = 5.5


def place_labels(
    figure, axis, points: Sequence[tuple[float, float]], names: Sequence[str], colours: Sequence[str]
) -> None:
    """Write a name beside each point, at the nearest place that is free; far ones with a line.

    Args:
        points: in data coordinates; the limits of the axes must be set.
    """
    figure.canvas.draw()  # settles the layout
    renderer = figure.canvas.get_renderer()
    scale = figure.dpi / 72
    at = [axis.transData.transform(point) for point in points]
    frame = axis.get_window_extent(renderer)
    taken, lines = [_around(x, y, _POINT * scale) for x, y in at], []
    crowd = [sum(math.dist(a, b) for b in at) for a in at]
    for k in sorted(range(len(at)), key=lambda k: -crowd[k]):
        text = axis.annotate(
            names[k],
            points[k],
            (0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=9,
            color=colours[k],
            zorder=4,
        )
        extent = text.get_window_extent(renderer)
        half = extent.width / 2 + 2 * scale, extent.height / 2 + scale
        x, y, radius = _free_place(at[k], half, taken, lines, frame, scale)
        text.xyann = (x - at[k][0]) / scale, (y - at[k][1]) / scale
        taken.append((x - half[0], y - half[1], x + half[0], y + half[1]))
        if radius > _RADII[1]:
            edge = _edge((x, y), half, at[k])
            lines += _along(at[k], edge, scale)
            ends = [axis.transData.inverted().transform(end) for end in (at[k], edge)]
            axis.plot(*zip(*ends), color=colours[k], lw=0.7, alpha=0.6, zorder=2, scalex=False, scaley=False)


def _free_place(point, half, taken, lines, frame, scale):
    """The centre of the nearest place that overlaps nothing, and its distance; else the least overlapping.

    ``taken`` are boxes, ``lines`` points along lines that were drawn. A line from here may cross no name.
    """
    best = None
    names = [box for box in taken if box[2] - box[0] > 3 * _POINT * scale]
    for radius in _RADII:
        for number in range(_DIRECTIONS):
            angle = 2 * math.pi * number / _DIRECTIONS
            # from the edge of the text, so that long names come as near as short ones
            x = point[0] + math.cos(angle) * (radius * scale + half[0])
            y = point[1] + math.sin(angle) * (radius * scale + half[1])
            box = (x - half[0], y - half[1], x + half[0], y + half[1])
            if box[0] < frame.x0 or box[2] > frame.x1 or box[1] < frame.y0 or box[3] > frame.y1:
                continue
            over = sum(_overlap(box, other) for other in taken)
            over += sum(_inside(spot, box) for spot in lines)
            if radius > _RADII[1]:
                own = _along(point, _edge((x, y), half, point), scale)
                over += sum(_inside(spot, other) for spot in own for other in names)
            if not over:
                return x, y, radius
            if best is None or over < best[0]:
                best = over, x, y, radius
    return best[1:] if best is not None else (*point, 0)


def _edge(centre, half, point):
    """Where the line from a point meets a text."""
    return tuple(min(max(p, c - h), c + h) for p, c, h in zip(point, centre, half))


def _along(start, end, scale):
    """Points on a line, a few points of the page apart."""
    steps = max(1, int(math.dist(start, end) / (3 * scale)))
    return [tuple(a + (b - a) * i / steps for a, b in zip(start, end)) for i in range(1, steps)]


def _inside(spot, box) -> bool:
    return box[0] < spot[0] < box[2] and box[1] < spot[1] < box[3]


def _around(x: float, y: float, radius: float):
    return x - radius, y - radius, x + radius, y + radius


def _overlap(one, other) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)
