"""Charts as SVG text: bars with labels, and lines over a doubling axis. No package is needed to draw them."""

from __future__ import annotations

import math
from xml.sax.saxutils import escape

_WIDTH, _ROW, _LEFT = 860, 26, 330
_BLUE, _ORANGE, _GREY = "#3b6ea8", "#d08030", "#999999"


def bars(title: str, rows: list[tuple[str, float, str]], limit: float | None = None) -> tuple[list[str], int]:
    """(SVG elements, height) of labelled bars (name, value, text); `limit` is drawn as a line."""
    most = max([value for _, value, _ in rows] + ([limit] if limit else []))
    room = _WIDTH - _LEFT - 130
    parts = [_text(10, 20, title, bold=True)]
    for index, (name, value, text) in enumerate(rows):
        top = 34 + index * _ROW
        length = room * value / most if most else 0
        parts.append(_text(10, top + 13, name[:58], small=True))
        parts.append(f'<rect x="{_LEFT}" y="{top}" width="{length:.1f}" height="18" fill="{_BLUE}"/>')
        parts.append(_text(_LEFT + length + 6, top + 13, text, small=True))
    bottom = 34 + len(rows) * _ROW
    if limit and most:
        x = _LEFT + room * limit / most
        parts.append(f'<line x1="{x:.1f}" y1="28" x2="{x:.1f}" y2="{bottom}" stroke="{_ORANGE}" stroke-width="2"/>')
    return parts, bottom + 16


def scaling(title: str, points: list[tuple[int, float]]) -> tuple[list[str], int]:
    """(SVG elements, height) of a rate over devices, both axes logarithmic, with the line of perfect scaling."""
    height, left, right, top = 300, 80, _WIDTH - 30, 40
    bottom = height - 40
    ideal = [(n, points[0][1] * n / points[0][0]) for n, _ in points]
    xs = [math.log2(n) for n, _ in points]
    ys = [math.log10(value) for _, value in [*points, *ideal]]
    wide, tall = max(xs[-1] - xs[0], 1e-9), max(max(ys) - min(ys), 1e-9)

    def place(n: float, value: float) -> str:
        x = left + (right - left) * (math.log2(n) - xs[0]) / wide
        y = bottom - (bottom - top) * (math.log10(value) - min(ys)) / tall
        return f"{x:.1f},{y:.1f}"

    parts = [_text(10, 20, title, bold=True)]
    for line, color, dash in ((ideal, _GREY, ' stroke-dasharray="5 4"'), (points, _BLUE, "")):
        path = " ".join(place(n, value) for n, value in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"{dash}/>')
    for n, value in points:
        x, y = place(n, value).split(",")
        parts.append(f'<circle cx="{x}" cy="{y}" r="3.5" fill="{_BLUE}"/>')
        parts.append(_text(float(x) - 8, bottom + 18, str(n), small=True))
        parts.append(_text(float(x) - 12, float(y) - 8, f"{value:,.0f}", small=True))
    parts.append(_text(left, height - 4, "devices; dashed: perfect scaling", small=True))
    return parts, height + 10


def page(charts: list[tuple[list[str], int]]) -> str:
    """One SVG document with the charts below each other."""
    body, top = [], 10
    for parts, height in charts:
        body.append(f'<g transform="translate(0,{top})">' + "".join(parts) + "</g>")
        top += height
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{top}" viewBox="0 0 {_WIDTH} {top}">'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(body)}</svg>\n'
    )


def _text(x: float, y: float, text: str, *, small: bool = False, bold: bool = False) -> str:
    size = 11 if small else 13
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-family="sans-serif" font-size="{size}"{weight}>{escape(text)}</text>'
