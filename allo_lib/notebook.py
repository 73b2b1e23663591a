"""What every notebook does beside the science: computed prose, tables, figures with captions."""

from IPython.display import HTML, Markdown, display

from allo_lib import analysis
from allo_lib.figure_style import save
from allo_lib.study import Study


def say(text: str) -> None:
    """Show a paragraph of Markdown, its numbers filled in from this run."""
    display(Markdown(text))


def warn(*found: str | None) -> None:
    """Show the warnings among `found` (`warning_signs`), in the log of a run too."""
    for text in filter(None, found):
        print(f"warning: {text}", flush=True)


def table(rows: list[dict], caption: str = "") -> None:
    """Show a list of equally keyed rows as a table; text is escaped."""
    import pandas

    frame = pandas.DataFrame(rows)
    display(HTML(frame.to_html(index=False, escape=True, float_format=lambda x: f"{x:.4g}")))
    if caption:
        say(f"*{caption}*")


def methods_table(found: dict[str, dict], caption: str) -> None:
    """Show what each method scored: method -> result, as `parallel.run_methods` gives them."""
    rows = []
    for method, result in found.items():
        score, error = analysis.score_of(result)
        rows.append({
            "method": method,
            "score": score,
            "standard error": error,
            "held-out reward accuracy": analysis.reward_accuracy(result),
            "displacement": result["displacement"],
            "rates": ", ".join(f"{rate:g}" for rate in result["rates"]),
        })  # fmt: skip
    table(rows, caption)


def show(figure, study: Study, name: str, caption: str, every_seed: bool = False) -> None:
    """Show a figure with its caption and save it as PNG and PDF under `figures/`.

    every_seed: the figure draws on all seeds of `measurements.csv`; else the seed joins its name.
    """
    file = name if every_seed else f"{name}_seed{study.seed}"
    save(figure, study.results_dir / "figures", file, caption)
    display(figure)
    say(f"*{caption}*")
    import matplotlib.pyplot as plt

    plt.close(figure)


def html(text: str) -> None:
    """Show HTML that the library made; whatever came from a model is escaped in it."""
    display(HTML(text))


def percent(value: float, digits: int = 1) -> str:
    """0.4567 -> "45.7%"."""
    return f"{100 * value:.{digits}f}%"
