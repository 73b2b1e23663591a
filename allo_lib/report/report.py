"""From outcomes and measurements to claims, tables, main figures, report and README's block."""

import base64
import csv
import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from allo_lib.engine import provenance
from allo_lib.errors import AlloError
from allo_lib.evaluation import claims as claims_module
from allo_lib.evaluation import outcomes, published
from allo_lib.evaluation.ablations import single_changes
from allo_lib.evaluation.claims import Claim
from allo_lib.evaluation.comparisons import StudyResults, judged_by
from allo_lib.evaluation.verdicts import POINTS, RULE
from allo_lib.report import figures, relative_change, row_comparisons, tables
from allo_lib.report.figure_style import caption_of
from allo_lib.study import manifest

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
PROFILES = ("tiny-full", "smollm2", "architectures", "tiny")
# What README asks of the first of these that is there, by claim (or part of one).
QUESTIONS = {
    "C4s": "Is ALLO better than a DPO of as many updates?",
    "C4": "... than a DPO of half as many, as the paper ran it?",
    "C5": "... than every other baseline (the strongest one)?",
    "C2.dpo": "Is DPO on the top 10% of the neurons better than on all?",
    "C2.dpo_last10": "... than on the last 10%?",
    "C3": "Is DPO on the last 10% less than 2 points worse than on all?",
    "C6": "Does forgetting before learning help?",
    "C7.allo_all_tokens_forgetting": "Does choosing tokens help in forgetting?",
    "C7.allo_all_tokens_learning": "... in learning?",
    "C8": "Are the masks more alike than chance (the least stable of three ways)?",
    "C9": "Does a better reward model give a better model?",
    "C10": "Does ALLO cost less than a dense mask?",
}
ANSWERS = {
    "supported": "yes",
    "contradicted": "no",
    "no difference": "no difference",
    "undecided": "undecided",
}
# Of a profile of one SFT model, wherever its claims stand.
_ALONE = (
    "One SFT model decides nothing: no claim about methods has a verdict here, whatever its "
    "interval over problems. The numbers show that everything runs and what it gives."
)
_OF_SEED = re.compile(r"_seed(\d+)\.png$")
_EFFICIENCY = {"variant", "device", "seconds_per_pair", "peak_bytes_above_model"}
# What stands beside a domain of whose data sets the paper has none.
_PAPER_AVERAGE = {
    "questions": ("qa_avg", "paper, mean of 4 question sets"),
    "helpfulness": ("instructions_avg", "paper, instruction following (win rate)"),
    "instructions": ("instructions_avg", "paper, instruction following (win rate)"),
}
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #1a1a1a; background: #fff }
table { border-collapse: collapse; margin: 1rem 0; font-size: .88rem; display: block;
  overflow-x: auto }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: left;
  vertical-align: top }
img { max-width: 100%; height: auto }
figure { margin: 1.5rem 0 }
figcaption, .note { color: #444; font-size: .9rem }
.supported { color: #00664b; font-weight: 600 }
.contradicted { color: #a34700; font-weight: 600 }
.no-difference { color: #0060a0; font-weight: 600 }
.undecided { color: #555; font-weight: 600 }
"""


def rebuild(
    results_dir: str | Path, paper_dir: str | Path | None = None, models: int | None = None
) -> list[Path]:
    """Claims, tables, main figures and report, from `outcomes.parquet` and `measurements.csv` (and,
    for C10, from `tables/efficiency.csv`), without torch; returns what was written.

    Same input, same bytes. `models`: how many SFT models the profile fixes beforehand; None reads
    it from the folder's manifest.
    """
    folder = Path(results_dir)
    results = StudyResults.load(folder, models or models_of(folder))
    efficiency = read_efficiency(folder / "tables" / "efficiency.csv")
    found = claims_module.compute(results, efficiency, paper_dir)
    claims_module.write(folder / "claims.csv", found)
    paths = [folder / "claims.csv"]
    made = [*tables.build(results, paper_dir), row_comparisons.claims_table(found)]
    paths += tables.write(made, folder / "tables")
    paths += draw(results, found, efficiency, folder / "figures", paper_dir)
    return [*paths, build(folder, results.models)]


def models_of(folder: str | Path) -> int:
    """How many SFT models the profile of a results folder fixes; 1 before its first manifest."""
    told = manifest.read(Path(folder)) or {}
    return told.get("settings", {}).get("models", 1)


def read_efficiency(path: str | Path) -> list[dict[str, str]]:
    """Rows of `tables/efficiency.csv`; none when notebook 07 has not been run yet.

    AlloError when the file is no text or lacks columns.
    """
    if not Path(path).exists():
        return []
    rows = list(csv.DictReader(_text(Path(path)).splitlines()))
    if rows and not set(rows[0]) >= _EFFICIENCY:
        raise AlloError(f"{path} lacks columns: expected {', '.join(sorted(_EFFICIENCY))}")
    return rows


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AlloError(f"{path} cannot be read as UTF-8 text ({error}): make it anew") from error


def draw(
    results: StudyResults,
    claims: Sequence[Claim],
    efficiency: Sequence[dict[str, str]],
    folder: Path,
    paper_dir: str | Path | None = None,
) -> list[Path]:
    """The figures that need nothing but the results: main table, study, ablations, claims."""
    paths = [
        figures.save(
            figures.claims_figure(claims),
            folder,
            "claims",
            "Every claim and its parts with 95% intervals over SFT models, those of the parts of "
            "one claim held together; right of zero supports it.",
        )
    ]
    changes = relative_change.changes_of(results, paper_dir)
    if any(change.interval for change in changes):
        figure = relative_change.draw(changes)
        paths.append(figures.save(figure, folder, "relative_change", relative_change.CAPTION))
    for domain in results.domains:
        paths += _draw_domain(results, domain, folder, paper_dir)
    if efficiency:
        caption = "Cost of one pair: time, peak memory above the loaded model, optimizer state."
        paths.append(
            figures.save(figures.efficiency_bars(efficiency), folder, "efficiency", caption)
        )
    return [path.with_suffix(suffix) for path in paths for suffix in (".png", ".pdf")]


def _draw_domain(results: StudyResults, domain, folder: Path, paper_dir) -> list[Path]:
    paths, unit = [], f"{domain.unit} (%)"
    own = {method: results.score(method, domain) for method in published.LABELS}
    measured = {m: (found.effect, *_ends(found)) for m, found in own.items() if found}
    if measured:
        paper, title = _paper_beside(domain, paper_dir)
        titles = {"title": f"{domain.name}: {', '.join(domain.datasets)}", "paper_title": title}
        figure = figures.main_table_figure(measured, paper, unit=domain.unit, **titles)
        caption = "All methods: measured, and the paper's own numbers on its models and data."
        caption += judged_by(results.index, domain)
        paths.append(figures.save(figure, folder, f"main_{domain.name}", caption))
    for suffix, protocol in (("", "each arm at its own best rate"), ("_paper", "one rate for all")):
        arms = ("dpo_top10", "dpo_last10", "dpo_random10", "dpo")
        own = {arm + suffix: results.score(arm + suffix, domain) for arm in arms}
        bars = {arm: (found.effect, _error(found)) for arm, found in own.items() if found}
        if len(bars) > 1:
            study = published.empirical_study(paper_dir)
            figure = figures.empirical_bars(bars, study, protocol, unit)
            caption = f"DPO on a tenth of the neurons and on all, {protocol}, beside the paper."
            name = f"empirical_{domain.name}{suffix}"
            paths.append(figures.save(figure, folder, name, caption))
    effects = _ablations(results, domain)
    if effects:
        figure = figures.ablation_bars(effects, "allo", unit=domain.unit)
        caption = "ALLO with one thing changed: paired differences to ALLO on the same problems."
        paths.append(figures.save(figure, folder, f"ablations_{domain.name}", caption))
    return paths


def _paper_beside(domain, paper_dir) -> tuple[dict[str, float], str]:
    """The paper's number of each method on the domain's own data sets, as far as it has them, else
    an average of its own; and which it is."""
    table = published.main_results(paper_dir)
    own = [name for name in domain.datasets if name in table["dpo"]]
    if not own:
        column, title = _PAPER_AVERAGE.get(domain.name, _PAPER_AVERAGE["questions"])
        return {method: row[column] for method, row in table.items()}, title
    mean = {method: sum(row[name] for name in own) / len(own) for method, row in table.items()}
    return mean, f"paper, {', '.join(own)}"


def _ablations(results: StudyResults, domain) -> dict[str, tuple[float, float, float]]:
    methods = ["dpo", "dpo_long", *sorted(single_changes(results.methods))]
    found = {method: results.compare(method, "allo", domain) for method in methods}
    return {name: (gap.effect, gap.low, gap.high) for name, gap in found.items() if gap}


def _ends(interval) -> tuple[float, float]:
    return (interval.low, interval.high) if interval.defined else (interval.effect,) * 2


def _error(interval) -> float:
    """The standard error that gives an error bar the interval's own half-width."""
    low, high = _ends(interval)
    return (high - low) / 2 / figures.Z95


def build(results_dir: str | Path, models: int | None = None) -> Path:
    """Write `report.html`: claims, tables and figures of the folder on one self-contained page.

    Needs `claims.csv`; raises AlloError without it, and for a table that is no text or a figure
    that is no picture. All text is escaped, nothing is loaded from elsewhere, and the same files
    give the same bytes.
    """
    folder = Path(results_dir)
    name = html.escape(folder.resolve().name)
    models = models or models_of(folder)
    parts = [
        f"<h1>ALLO, reproduced: {name}</h1>",
        '<p class="note">Low-Redundant Optimization for Large Language Model Alignment '
        "(arXiv 2406.12606). Every number comes from outcomes.parquet and measurements.csv of this "
        "folder.</p>",
        "<h2>Claims</h2>",
        _note_html(_ALONE if models == 1 else ""),
        f'<p class="note">{_inline(RULE)}</p>',
        _claims_html(claims_module.read(folder / "claims.csv")),
        _figure_html(folder / "figures" / "claims.png"),
        _figure_html(folder / "figures" / "relative_change.png"),
        "<h2>Tables</h2>",
        _note_html(provenance.several_devices(manifest.noted(folder)["cells"])),
        *[_table_html(path) for path in sorted((folder / "tables").glob("*.md"))],
        "<h2>Figures</h2>",
        *_figures_html(folder / "figures"),
    ]
    head = (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>ALLO, reproduced: {name}</title>\n<style>{_STYLE}</style></head>\n<body>\n"
    )
    page = head + "\n".join(part for part in parts if part) + "\n</body>\n</html>\n"
    path = folder / "report.html"
    path.write_bytes(page.encode("utf-8"))
    return path


def _note_html(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>' if text else ""


def _claims_html(claims: Sequence[Claim]) -> str:
    header = ["id", "claim", "effect", "95% interval", "unit", "verdict", "evidence"]
    lines = ["<table><tr>" + "".join(f"<th>{cell}</th>" for cell in header) + "</tr>"]
    for claim in claims:
        cells = [claim.id, claim.claim, *effect_text(claim), claim.unit]
        row = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        kind = html.escape(claim.verdict.replace(" ", "-"), quote=True)
        row += f'<td class="{kind}">{html.escape(claim.verdict)}</td>'
        lines.append(f"<tr>{row}<td>{html.escape(claim.evidence)}</td></tr>")
    return "\n".join([*lines, "</table>"])


def effect_text(claim: Claim) -> tuple[str, str]:
    """Effect and interval as text: points for accuracies, the plain number for other units."""
    if claim.effect is None:
        return "not measured", ""
    points = claim.unit in POINTS
    form = (lambda x: f"{100 * x:+z.2f}") if points else (lambda x: f"{x:+z.4f}")
    words = form(claim.effect) + (" points" if points else "")
    if claim.ci_low is None:
        return words, "none"
    return words, f"[{form(claim.ci_low)}, {form(claim.ci_high)}]"


def _figures_html(folder: Path) -> list[str]:
    """Figures of all seeds together, and those of the lowest seed; others stay in the folder."""
    above = ("claims.png", "relative_change.png")  # they stand with the claims
    paths = [path for path in sorted(folder.glob("*.png")) if path.name not in above]
    seeds = sorted({int(found[1]) for path in paths if (found := _OF_SEED.search(path.name))})
    of_others = [
        path for path in paths
        if (found := _OF_SEED.search(path.name)) and int(found[1]) != seeds[0]
    ]  # fmt: skip
    parts = [_figure_html(path) for path in paths if path not in of_others]
    if of_others:
        parts.append(
            f'<p class="note">Figures of single seeds are those of seed {seeds[0]}; those of '
            f"{', '.join(map(str, seeds[1:]))} are in the folder figures/.</p>"
        )
    return parts


def _figure_html(path: Path) -> str:
    if not path.exists():
        return ""
    picture = base64.b64encode(path.read_bytes()).decode("ascii")
    try:
        caption = caption_of(path)
    except (OSError, ValueError) as error:
        raise AlloError(f"{path} is not a readable picture: make it anew") from error
    text = html.escape(caption or path.stem.replace("_", " "), quote=True)
    source = f"data:image/png;base64,{picture}"
    return f'<figure><img alt="{text}" src="{source}"><figcaption>{text}</figcaption></figure>'


def _table_html(path: Path) -> str:
    """A Markdown table as `tables.markdown` writes it: title, one table, caption."""
    parts = []
    grid: list[str] = []
    for line in [*_text(path).splitlines(), ""]:
        if line.startswith("|"):
            cells = [_inline(cell.strip()) for cell in line.strip().strip("|").split("|")]
            tag = "td" if grid else "th"
            if not set(line) <= set("|-: "):
                grid.append("".join(f"<{tag}>{cell}</{tag}>" for cell in cells))
            continue
        if grid:
            parts.append(f"<table>{''.join(f'<tr>{row}</tr>' for row in grid)}</table>")
            grid = []
        if line.startswith("#"):
            parts.append(f"<h3>{_inline(line.lstrip('# '))}</h3>")
        elif line.strip():
            parts.append(f'<p class="note">{_inline(line)}</p>')
    return "\n".join(parts)


def _inline(text: str) -> str:
    """Escaped text with only our own marks brought back: bold, underlined, code."""
    text = html.escape(text)
    text = re.sub(r"&lt;u&gt;(.*?)&lt;/u&gt;", r"<u>\1</u>", text)
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text)


def readme_block(results_root: str | Path) -> str:
    """The answers of the first committed profile of PROFILES, and where the others' are."""
    folders = [Path(results_root) / profile for profile in PROFILES]
    first, *others = [path for path in folders if (path / outcomes.NAME).exists()] or [None]
    parts = [] if first is None else [_answers(first, f"results/{first.name}")]
    if others:
        told = [f"[`{path.name}`](results/{path.name}/report.html)" for path in others]
        parts.append(f"Every claim, part and table of the other profiles: {', '.join(told)}.")
    rule = f"<details><summary>The rule of the verdicts</summary>\n\n{RULE}\n\n</details>"
    return "\n\n".join([BEGIN, *parts, rule, END])


def _answers(folder: Path, link: str) -> str:
    results = StudyResults.load(folder, models_of(folder))
    claims = {claim.id: claim for claim in claims_module.read(folder / "claims.csv")}
    lines = [f"**{_in_short(claims.values(), results.models)}**", "", _provenance(folder, results)]
    for name in (f"main_{domain.name}" for domain in results.domains[:1]):
        figure = folder / "figures" / f"{name}.png"
        if figure.exists():
            lines += ["", f"![{caption_of(figure)}]({link}/figures/{figure.name})"]
            lines += ["", f"Redraw it: `./run_all.sh figures {folder.name} {name}`"]
    lines += ["", "| question | measured | 95% interval | the paper | answer |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    papers = _published(folder)
    for name, question in QUESTIONS.items():
        claim = claims.get(name)
        if claim is not None and claim.effect is not None:
            effect, interval = effect_text(claim)
            if claim.unit not in POINTS:
                effect += f" {claim.unit}"
            cells = [question, effect, interval, papers.get(name, ""), ANSWERS[claim.verdict]]
            lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    lines += ["", f"Differences are in points of accuracy. Evidence for each answer, and every "
              f"other claim: [report]({link}/report.html), [claims]({link}/claims.csv), "
              f"[tables]({link}/tables), [p-values]({link}/tables/verdicts.md)."]  # fmt: skip
    differing = claims_module.protocol_disagreements(list(claims.values()))
    return "\n".join([*lines, *(["", *[f"- {text}" for text in differing]] if differing else [])])


def _in_short(claims: Iterable[Claim], models: int) -> str:
    """What was found, in a sentence."""
    if models == 1:
        return _ALONE
    verdicts = [c.verdict for c in claims if c.id == c.whole and c.family == "primary"]
    told = [f"{verdicts.count(verdict)} {verdict}" for verdict in ANSWERS if verdict in verdicts]
    return (
        f"Of the paper's claims C1 to C9, each method at its own best rates, on {models} "
        f"independent SFT models: {', '.join(told)}."
    )


def _provenance(folder: Path, results: StudyResults) -> str:
    """Model, seeds, replicates and cost of a committed run."""
    told = manifest.read(folder) or {}
    seconds = [s for run in told.get("runs", {}).values() for s in run["seconds"].values()]
    settings = told.get("settings", {}).get("replicates", {})
    runs = settings.get("pair_sets", 1) * settings.get("orders", 1)
    seeds = ", ".join(map(str, results.seeds))
    cost = f"; {sum(seconds) / 60:.0f} minutes on {told['cores']} cores" if seconds else ""
    several = "s" * (len(results.seeds) > 1)
    return (
        f"`{folder.name}`: SFT model{several} of seed{several} {seeds}, each with {runs} "
        f"run{'s' * (runs > 1)} of a method{cost} ({told.get('processor', 'unknown processor')})."
    )


def _published(folder: Path) -> dict[str, str]:
    """The paper's effect beside a claim, in points, by id; claims without one are left out."""
    path = folder / "tables" / "verdicts.csv"
    rows = csv.DictReader(_text(path).splitlines()) if path.exists() else ()
    return {row["id"]: f"{100 * float(row['published']):+.2f}" for row in rows if row["published"]}


def readme_is_current(readme_path: str | Path, results_root: str | Path) -> bool:
    """Whether the README's block equals a fresh rendering of the results."""
    return readme_block(results_root) in Path(readme_path).read_text(encoding="utf-8")


def update_readme(readme_path: str | Path, results_root: str | Path) -> None:
    """Replace the block between the markers; AlloError when the README does not have both."""
    path = Path(readme_path)
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise AlloError(
            f"{path} lacks the markers {BEGIN} and {END}: add both on lines of their own"
        )
    path.write_bytes((before + readme_block(results_root) + after).encode("utf-8"))
