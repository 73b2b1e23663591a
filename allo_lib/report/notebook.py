"""What every notebook does beside the science: computed prose, tables, figures with captions."""

from IPython.display import HTML, Markdown, display
from transformers.utils import logging

logging.disable_progress_bar()  # of weights that load; it would stand in a red box


def say(text: str) -> None:
    """Show a paragraph of Markdown, its numbers filled in from this run."""
    display(Markdown(text))


def table(rows: list[dict], caption: str = "") -> None:
    """Show a list of equally keyed rows as a table; text is escaped."""
    import pandas

    frame = pandas.DataFrame(rows)
    display(HTML(frame.to_html(index=False, escape=True, float_format=lambda x: f"{x:.4g}")))
    if caption:
        say(f"*{caption}*")


def draw(figure, caption: str) -> None:
    """Show a figure with its caption."""
    display(figure)
    say(f"*{caption}*")


def percent(value: float, digits: int = 1) -> str:
    """0.4567 -> "45.7%"."""
    return f"{100 * value:.{digits}f}%"
