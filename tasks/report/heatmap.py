"""Draws a cross-site matrix: a pure function from the matrix to SVG text.

The same matrix gives the same text. A row per data site, a column per model. The darker a cell, the
better its score compared to the other cells; without a score, the cell is empty. Names come from
outside, so the picture escapes them.
"""

from collections.abc import Sequence
from typing import Literal
from xml.sax.saxutils import escape

from fedpool.site_order import in_order
from fedpool.tasks.matrix import Matrix, owners
from fedpool.tasks.report.curves import Curve

MAX_CELLS = 40
"""Maximum number of rows and of columns. The report and `cross_site.json` have all of them."""

_LEFT, _TOP = 120, 110
_CELL_WIDTH, _CELL_HEIGHT = 64, 28
_MAX_NAME = 14
_LARGEST = 1e100
_LIGHT, _DARK = (239, 246, 255), (30, 64, 175)


def heat_map(matrix: Matrix, metric: str, mode: Literal["max", "min"]) -> Curve | None:
    """The picture of a metric; None if no site has reported it.

    Args:
        mode: whether higher or lower values are better.
    """
    rows, columns = in_order(matrix)[:MAX_CELLS], owners(matrix)[:MAX_CELLS]
    scores = {
        (site, owner): value
        for site in rows
        for owner in columns
        if (value := matrix[site].get(owner, {}).get(metric)) is not None and abs(value) <= _LARGEST
    }
    if not scores:
        return None
    width, height = _LEFT + _CELL_WIDTH * len(columns) + 16, _TOP + _CELL_HEIGHT * len(rows) + 32
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12" fill="#475569">',
        f"<title>{_name(metric)} of every model at every site</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="16" y="24" font-size="16" font-weight="bold" fill="#0f172a">{_name(metric)}</text>',
        f'<text x="16" y="42">rows: sites (data); columns: owners of the models{_left_out(matrix, rows, columns)}</text>',
    ]
    for column, owner in enumerate(columns):
        middle = _LEFT + _CELL_WIDTH * column + _CELL_WIDTH // 2
        parts.append(
            f'<text x="{middle}" y="{_TOP - 8}" transform="rotate(-30 {middle} {_TOP - 8})">{_name(owner)}</text>'
        )
    low, high = min(scores.values()), max(scores.values())
    for row, site in enumerate(rows):
        top = _TOP + _CELL_HEIGHT * row
        parts.append(f'<text x="{_LEFT - 8}" y="{top + 18}" text-anchor="end">{_name(site)}</text>')
        for column, owner in enumerate(columns):
            value = scores.get((site, owner))
            quality = None
            if value is not None:
                share = (value / 2 - low / 2) / (high / 2 - low / 2) if high > low else 0.5  # halves don't overflow
                quality = share if mode == "max" else 1 - share
            parts += _cell(_LEFT + _CELL_WIDTH * column, top, value, quality)
    return Curve("cross-site-map", metric, "\n".join([*parts, "</svg>\n"]))


def _cell(left: int, top: int, value: float | None, quality: float | None) -> list[str]:
    """One score, or an empty frame. `quality`, from 0 (worst) to 1 (best), is its darkness."""
    frame = f'x="{left}" y="{top}" width="{_CELL_WIDTH - 2}" height="{_CELL_HEIGHT - 2}"'
    if value is None or quality is None:
        return [f'<rect {frame} fill="#ffffff" stroke="#e2e8f0"/>']
    ink = "#ffffff" if quality > 0.5 else "#0f172a"
    middle = left + _CELL_WIDTH // 2 - 1
    return [
        f'<rect {frame} fill="{_color(quality)}"/>',
        f'<text x="{middle}" y="{top + 18}" text-anchor="middle" fill="{ink}">{value:.4g}</text>',
    ]


def _color(share: float) -> str:
    return "#" + "".join(
        f"{round(light + share * (dark - light)):02x}" for light, dark in zip(_LIGHT, _DARK, strict=True)
    )


def _name(text: str) -> str:
    shown = "".join(c if c.isprintable() else "?" for c in text)
    return escape(shown if len(shown) <= _MAX_NAME else f"{shown[: _MAX_NAME - 1]}…")


def _left_out(matrix: Matrix, rows: Sequence[str], columns: Sequence[str]) -> str:
    more = (len(matrix) - len(rows), len(owners(matrix)) - len(columns))
    return f" (without {more[0]} more sites and {more[1]} more models)" if any(more) else ""
