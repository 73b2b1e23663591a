"""Responses with every token on its own colour: as a figure, and as escaped HTML for notebooks."""

import html
from collections.abc import Sequence

from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from allo_lib.figure_style import subplots

# From white to orange, light enough everywhere for black text.
_COLOURS = LinearSegmentedColormap.from_list("tokens", ["#FFFFFF", "#FBD0A8", "#F28E2B"])
_LINE = 112  # characters a line of the picture
Row = tuple[Sequence[str], Sequence[float], str]


def token_rewards_picture(
    rows: Sequence[Row], label: str = "weight", reverse: bool = False, limits=(0.0, 1.0)
) -> Figure:
    """Rows of (tokens, values, title) as coloured text, lines wrapped.

    High values are orange; `reverse` makes low ones so, as for token probabilities, where low means
    unaligned. Tokens without any white space among them are set apart by one space.
    """
    placed = [_place(tokens, values) for tokens, values, _ in rows]
    lines = sum(height for _, height in placed) + 1.6 * len(rows)
    figure, axis = subplots(size=(9.2, 0.24 * lines + 0.75))
    scale = ScalarMappable(Normalize(*limits), _COLOURS.reversed() if reverse else _COLOURS)
    top = 0.0
    for (cells, height), (_, _, title) in zip(placed, rows, strict=True):
        axis.text(0, top, title, size=10, weight="bold", va="center", parse_math=False)
        for text, column, line, value in cells:
            _cell(axis, text, column, top + 1.1 + line, scale.to_rgba(value))
        top += height + 1.6
    axis.set(xlim=(0, _LINE), ylim=(top, -0.8))
    axis.axis("off")
    bar = figure.colorbar(scale, ax=axis, orientation="horizontal", fraction=0.04, aspect=50)
    bar.set_label(label)
    return figure


def token_rewards_html(
    rows: Sequence[Row], label: str = "weight", reverse: bool = False, limits=(0.0, 1.0)
) -> str:
    """The same as HTML; all text is escaped, and hovering over a token shows its value."""
    scale = ScalarMappable(Normalize(*limits), _COLOURS.reversed() if reverse else _COLOURS)
    parts = []
    for tokens, values, title in rows:
        tokens, values = _checked(tokens, values)
        spans = []
        for token, value in zip(tokens, values, strict=True):
            red, green, blue, _ = scale.to_rgba(value, bytes=True)
            style = f"background:rgb({red},{green},{blue});color:#000"
            about = html.escape(f"{label} {value:.3f}", quote=True)
            spans.append(f'<span style="{style}" title="{about}">{html.escape(token)}</span>')
        body = "".join(spans)
        parts.append(
            f"<p><b>{html.escape(title)}</b></p>"
            f'<p style="font-family:monospace;white-space:pre-wrap;line-height:1.7">{body}</p>'
        )
    return "\n".join(parts)


def _checked(tokens: Sequence[str], values: Sequence[float]) -> tuple[list[str], list[float]]:
    """Tokens with a space after each where the tokens themselves bring none."""
    if len(tokens) != len(values):
        raise ValueError(f"{len(tokens)} tokens with {len(values)} values: give one value a token")
    if not any(character.isspace() for token in tokens for character in token):
        tokens = [f"{token} " for token in tokens]
    return list(tokens), [float(value) for value in values]


def _place(tokens: Sequence[str], values: Sequence[float]) -> tuple[list, int]:
    """Cells (text, column, line, value) of a wrapped response and the number of its lines."""
    cells, column, line = [], 0, 0
    for token, value in zip(*_checked(tokens, values), strict=True):
        breaks = token.count("\n")
        text = token.replace("\r", "").replace("\n", "\u21b5").replace("\t", "    ")
        # A token longer than a line is cut into lines; others move to the next line whole.
        if column and column + len(text.rstrip()) > _LINE:
            column, line = 0, line + 1
        while text:
            piece, text = text[: _LINE - column], text[_LINE - column :]
            cells.append((piece, column, line, value))
            column += len(piece)
            if text:
                column, line = 0, line + 1
        if breaks:
            column, line = 0, line + 1
    return cells, line + 1


def _cell(axis, text: str, column: int, line: float, colour) -> None:
    from matplotlib.patches import Rectangle

    axis.add_patch(Rectangle((column, line - 0.45), len(text), 0.9, color=colour, lw=0))
    # One letter a column keeps the text on its colours whatever the font's own width.
    for i, letter in enumerate(text):
        if not letter.isspace():
            axis.text(
                column + i + 0.5,
                line,
                letter,
                size=9,
                family="monospace",
                ha="center",
                va="center",
                parse_math=False,
            )
