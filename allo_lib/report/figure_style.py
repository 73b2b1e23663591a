"""One style for all figures, and saving them so that the same figure gives the same bytes.

Colours are those of Okabe & Ito (2008), told apart by readers with any colour vision.
"""

import io
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image, PngImagePlugin

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#777777"
Z95 = 1.959964  # half-width of a 95% interval in standard errors
# One colour a kind of method, the same in every figure: the first beginning that fits counts.
_METHODS = {
    "sft_base": GREY,
    "allo": "#D55E00",
    "dpo_top": "#009E73",
    "dpo_last": "#56B4E9",
    "dpo_random": "#E69F00",
    "dpo": "#0072B2",
    "sft": "#CC79A7",
    "rft": "#CC79A7",
    "": "#000000",
}
VERDICT_STYLE = {
    "supported": ("#009E73", "o"),
    "contradicted": ("#D55E00", "X"),
    "no difference": ("#0072B2", "D"),
    "undecided": (GREY, "s"),
}
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
}


def subplots(rows: int = 1, columns: int = 1, size: tuple[float, float] = (6.4, 3.6), **options):
    """`plt.subplots` in the study's style; the figure is closed, so only its return shows it."""
    plt.rcParams.update(_STYLE)
    figure, axes = plt.subplots(rows, columns, figsize=size, **options)
    plt.close(figure)
    return figure, axes


def method_colour(method: str) -> str:
    """The colour of a method by its name in `measurements.csv`, in whatever figure it stands."""
    return next(colour for begins, colour in _METHODS.items() if method.startswith(begins))


def row_names(axis, names) -> None:
    """Name the rows of a panel from top to bottom, at places 0, 1, ..."""
    axis.set_yticks(range(len(names)), list(names))
    axis.set_ylim(len(names) - 0.4, -0.6)


def save(figure: Figure, folder: str | Path, name: str, caption: str = "") -> Path:
    """Write `name`.png (150 dpi, 256 colours) and `name`.pdf without dates.

    The PNG carries the caption as its description, which `caption_of` reads. The same figure gives
    the same bytes. Returns the path of the PNG.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update(_STYLE)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    # A palette makes the committed files and the report a third of their size.
    small = Image.open(picture).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    about = PngImagePlugin.PngInfo()
    about.add_itxt("Description", caption)
    small.save(folder / f"{name}.png", optimize=True, pnginfo=about)
    no_dates = {"CreationDate": None, "ModDate": None, "Producer": None, "Creator": None}
    figure.savefig(folder / f"{name}.pdf", metadata=no_dates)
    return folder / f"{name}.png"


def caption_of(path: str | Path) -> str:
    """The caption that `save` put into a PNG; empty for other PNGs."""
    with Image.open(path) as picture:
        return str(getattr(picture, "text", {}).get("Description", ""))
