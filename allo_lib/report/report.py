"""From outcomes and measurements to claims, tables, figures, the report and README's block."""

import base64
import csv
import dataclasses
import hashlib
import html
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from allo_lib.errors import AlloError
from allo_lib.evaluation import claims as claims_module
from allo_lib.evaluation import outcomes, published
from allo_lib.evaluation.claims import Claim
from allo_lib.evaluation.comparisons import DOMAINS, INSTRUCTIONS, StudyResults
from allo_lib.evaluation.stats import held_together
from allo_lib.evaluation.verdicts import POINTS, RULE
from allo_lib.report import figures, tables
from allo_lib.report.figure_style import caption_of
from allo_lib.study import manifest

NAME = "report.html"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
# Those of this project, the ones that say most first; others stand behind them.
PROFILES = ("tiny-full", "smollm2", "architectures", "tiny")
# What README and the report ask of a profile, by claim (or part of one).
QUESTIONS = {
    "C4s": "Is ALLO better than a DPO of as many updates?",
    "C4": "... than a DPO of half as many, as the paper ran it?",
    "C5": "... than every other baseline (the smallest effect)?",
    "C2.dpo": "Is DPO on the top 10% of the neurons better than on all?",
    "C2.dpo_last10": "... than on the last 10%?",
    "C3": "Is DPO on the last 10% less than 2 points worse than on all?",
    "C1": "Does DPO on the top 10% of the neurons reach a lower held-out loss than on all?",
    "C6": "Does forgetting before learning help?",
    "C7.allo_all_tokens_forgetting": "Does choosing tokens help in forgetting?",
    "C7.allo_all_tokens_learning": "... in learning?",
    "C8": "Are the masks more alike than chance (the least stable of three ways)?",
    "C9": "Does a better reward model give a better model?",
    "C10": "Does ALLO cost less than a dense mask?",
}
ANSWERS = {"supported": "yes", "contradicted": "no"} | {
    v: v for v in ("no difference", "undecided")
}
# The report's figures by what they answer: words, beginnings of their names.
_GROUPS = (
    ("Is ALLO better than other methods?", ("main_", "relative_change")),
    ("Which neurons?", ("empirical_",)),
    ("What does each part of ALLO do?", ("ablations_",)),
    ("Does it hold on other architectures?", ("architectures",)),
    ("What does a step cost?", ("efficiency",)),
    ("All claims", ("claims",)),
    ("Other figures", ("",)),
)
_MOST_BYTES = 1_900_000  # of the page; pictures that do not fit in are linked
# Of a profile of one SFT model, wherever its claims stand.
_ALONE = (
    "One SFT model decides nothing: no claim about methods has a verdict here, whatever its "
    "interval over problems. The numbers show that everything runs and what it gives."
)
_INFO = ("commit", "dirty", "profile_hash", "size", "platform", "device", "python", "versions")
_EFFICIENCY = {"variant", "device", "seconds_per_pair", "peak_bytes_above_model"}
# Below the answers.
_NOTE = (
    "Differences{about} are in points of accuracy. Intervals of questions about a part of a claim "
    "(C2, C7) hold together with those of its other parts; those of C5 and C8 are of the smallest "
    "effect, whichever it is. C10 also needs at least 5% less peak memory."
)
_GENERATOR = '<meta name="generator" content="allo_lib">'


def rebuild(results_dir: str | Path, settings: dict | None = None) -> list[Path]:
    """Claims, tables and figures (`remake`), and the report beside the folder (`build`)."""
    return [*remake(results_dir, settings), build(results_dir, settings)]


def remake(results_dir: str | Path, settings: dict | None = None) -> list[Path]:
    """Claims, tables and figures, from `outcomes.parquet` and `measurements.csv` (and, for C10,
    from `tables/efficiency.csv`), without torch; returns what was written.

    Same input, same bytes. settings: those of the profile (`Profile.to_dict`), as to how many SFT
    models it fixes beforehand, of which architectures; None reads them from the folder's manifest.

    Raises:
        AlloError: neither is there, so that nobody knows how many models a verdict needs.
    """
    folder = Path(results_dir)
    settings = settings or settings_of(folder)
    domains = settings.get("domains", {}).items()
    by_domain = {name: one["models"] for name, one in domains if one.get("models")}
    replying = [one for _, one in domains if one.get("instructions", {}).get("datasets")]
    if fewer := [one["models"] for one in replying if one.get("models")]:
        by_domain[INSTRUCTIONS.name] = min(fewer)
    models, first = settings.get("models", 1), settings.get("first_seed", 0)
    results = StudyResults.load(folder, models, by_domain, first)
    if not settings:
        raise AlloError(f"{folder} has no manifest.json: run its profile, which leaves one there")
    efficiency = read_efficiency(folder / "tables" / "efficiency.csv")
    claims = claims_module.compute(results, efficiency)
    claims_module.write(folder / "claims.csv", claims)
    names = settings.get("model", {}).get("architectures", [])
    groups = claims_module.by_architecture(results, names)
    made = [*tables.build(results), tables.claims_table(claims)]
    made += [tables.architectures_table(groups)] if groups else []
    paths = tables.write(made, folder / "tables")
    paths += figures.draw(results, claims, efficiency, groups, folder / "figures")
    return [folder / "claims.csv", *paths]


def settings_of(folder: Path) -> dict:
    """The settings of a results folder's profile; none before its first manifest."""
    return (manifest.read(folder) or {}).get("settings", {})


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
        raise AlloError(f"{path} cannot be read as UTF-8 text ({error}): make it again") from error


# --- what a profile found ------------------------------------------------------------------------


def answers(folder: Path, claims: Iterable[Claim]) -> list[list[str]]:
    """Id, question, effect, interval, the paper's effect, answer: a row a measured claim of
    QUESTIONS. The paper's effects are those of `tables/verdicts.csv`; a "no" to a question about
    the smallest of several effects names those that are below.
    """
    path, known = folder / "tables" / "verdicts.csv", {claim.id: claim for claim in claims}
    paper = csv.DictReader(_text(path).splitlines() if path.exists() else ())
    effects = {r["id"]: f"{100 * float(r['published']):+.2f}" for r in paper if r["published"]}
    rows = []
    for name, question in QUESTIONS.items():
        claim = known.get(name)
        if claim is not None and claim.effect is not None:
            effect, interval = claims_module.effect_text(claim)
            effect += "" if claim.unit in POINTS else f" {claim.unit}"
            below = [published.method_label(one.id.partition(".")[2]) for one in known.values()
                     if one.whole == name != one.id and one.verdict == claim.verdict]  # fmt: skip
            answer = ANSWERS[claim.verdict]
            answer += f": {', '.join(below)}" if below and answer == "no" else ""
            rows.append([name, question, effect, interval, effects.get(name, ""), answer])
    return rows


def beside(claims: Iterable[Claim], cited: Path, here: int = 1) -> list[dict[str, str]]:
    """Rows of a table: effects on `here` SFT models beside those of the results folder `cited`.

    Of m models with standard deviation s the mean has the variance s^2 / m, and that of k further
    ones lies s^2 (1 / k + 1 / m) around it: its range is the interval of the mean times
    sqrt(m / k + 1). A claim of several parts is there by these alone.
    """
    if not here:
        return []
    known = {claim.id: claim for claim in claims_module.read(cited / "claims.csv")}
    models, rows = len(fixed_seeds(cited, settings_of(cited))), []
    parts = Counter(one.whole for one in known.values()
                    if one.id != one.whole and one.ci_low is not None)  # fmt: skip
    for claim in claims:
        other = known.get(claim.id)
        if other is None or None in (claim.effect, other.effect, other.ci_low, other.ci_high):
            continue
        if claim.id in parts or claim.family == "costs":  # whose interval is over processes
            continue
        wide = math.sqrt(models / here + 1) / held_together(parts.get(claim.whole, 1), models)
        low, high = (
            other.effect + (end - other.effect) * wide for end in (other.ci_low, other.ci_high)
        )
        new = dataclasses.replace(other, ci_low=low, ci_high=high)
        effect, interval = claims_module.effect_text(other)
        rows.append({
            "id": claim.id, "here": claims_module.effect_text(claim)[0], cited.name: effect,
            "95% interval": interval, "as many more models": claims_module.effect_text(new)[1],
            "inside": "yes" if low <= claim.effect <= high else "no",
        })  # fmt: skip
    return rows


def by_verdict(claims: Sequence[Claim]) -> dict[str, list[str]]:
    """Verdict -> ids of the claims that have it; last, those that were not measured."""
    found = {v: [c.id for c in claims if c.verdict == v and c.effect is not None] for v in ANSWERS}
    return found | {"not measured": [c.id for c in claims if c.effect is None]}


def _in_short(folder: Path, claims: Sequence[Claim], settings: dict) -> str:
    """What was found on the first domain, in a sentence."""
    if (models := settings.get("models", 1)) == 1:
        return _ALONE
    primary = [c for c in claims if c.id == c.whole and c.family == "primary" and ":" not in c.id]
    found = by_verdict(primary)
    counts = [f"{len(ids)} {words} ({', '.join(ids)})" for words, ids in found.items() if ids]
    there = len(fixed_seeds(folder, settings))
    return (
        f"Of the paper's claims C1 to C9{_about(folder, claims)}, each method tuned by "
        f"itself, on {models if there == models else f'{there} of {models}'} independent SFT "
        f"models: {', '.join(counts)}."
    )


def _about(folder: Path, claims: Iterable[Claim]) -> str:
    """The domain that plain ids are about, where others have claims too: " on questions"."""
    several = any(":" in claim.id and claim.family != "costs" for claim in claims)
    figure = _main_figure(folder) if several else None
    return f" on {figure.stem.removeprefix('main_')}" if figure else ""


def fixed_seeds(folder: Path, settings: dict) -> list[int]:
    """Seeds of the SFT models that are there, of those that the profile fixes."""
    models, first = settings.get("models", 1), settings.get("first_seed", 0)
    return [s for s in manifest.measured_seeds(folder) if s in range(first, first + models)]


def _provenance(folder: Path, settings: dict) -> str:
    """Model, seeds, replicates and cost of a run: its notebooks' seconds, or what its processes
    took on all cores at once where that is more, as of a run that was made in pieces."""
    info = manifest.read(folder) or {}
    seconds = [s for run in info.get("runs", {}).values() for s in run["seconds"].values()]
    replicates, seeds, cost = settings.get("replicates", {}), fixed_seeds(folder, settings), ""
    runs = replicates.get("pair_sets", 1) * replicates.get("orders", 1)
    if seconds:
        minutes = max(sum(seconds), info.get("process_seconds", 0) / info["cores"]) / 60
        cost = f"; {minutes:.0f} minutes on {info['cores']} cores"
    several, most = "s" * (len(seeds) > 1), "up to " * bool(replicates.get("once"))
    return (
        f"`{folder.name}`: SFT model{several} of seed{several} {', '.join(map(str, seeds))}, each "
        f"with {most}{runs} run{'s' * (runs > 1)} of a method{cost} "
        f"({info.get('processor', 'unknown processor')})."
    )


def _main_figure(folder: Path) -> Path | None:
    """The figure of all methods on the first domain."""
    known = [folder / "figures" / f"main_{domain}.png" for domain in DOMAINS]
    found = [path for path in known if path.exists()]
    return next(iter(found or sorted((folder / "figures").glob("main_*.png"))), None)


# --- the report ----------------------------------------------------------------------------------


def build(results_dir: str | Path, settings: dict | None = None) -> Path:
    """Write `report.html` beside the folder: one self-contained page of it and of every other
    results folder there that has `outcomes.parquet`.

    settings: of this folder, as in `remake`. AlloError without its `claims.csv`, for a table that
    is no text, a figure that is no picture, or another's `report.html` there; other folders that
    cannot be read are named on the page. All text is escaped, nothing is loaded from elsewhere,
    and the same files give the same bytes.
    """
    folder = Path(results_dir).resolve()
    target = folder.parent / NAME
    if target.exists() and _GENERATOR.encode() not in target.read_bytes()[:2000]:
        raise AlloError(f"{target} is not a report of this project: move it, or use another folder")
    beside = {path.parent for path in folder.parent.glob(f"*/{outcomes.NAME}")} | {folder}
    order = {name: place for place, name in enumerate(PROFILES)}
    profiles, broken = [], []
    for path in sorted(beside, key=lambda path: (order.get(path.name, len(order)), path.name)):
        try:
            profiles.append(_profile(path, settings if path == folder else None))
        except AlloError:
            if path == folder:
                raise
            broken.append(path.name)
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=StrictUndefined,
    )  # fmt: skip
    templates.filters["anchor"] = _anchor
    script = (Path(__file__).parent / "report.js").read_text(encoding="utf-8")
    page = templates.get_template("report.html.j2").render(
        profiles=_within_size(profiles),
        broken=broken,
        rule=_inline(RULE),
        effect_text=claims_module.effect_text,
        points=POINTS,
        generator=Markup(_GENERATOR),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    outcomes.replace_file(target, page.encode("utf-8"))
    return target


def _anchor(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")


def _profile(folder: Path, settings: dict | None) -> dict:
    """What the page shows of one results folder, pictures as paths."""
    settings = settings or settings_of(folder)
    claims = claims_module.read(folder / "claims.csv")
    written = [_table(path) for path in sorted((folder / "tables").glob("*.md"))]
    first, groups = _main_figure(folder), {words: [] for words, _ in _GROUPS}
    for path in sorted((folder / "figures").glob("*.png")):
        if path != first:
            words = next(words for words, begins in _GROUPS if path.stem.startswith(begins))
            groups[words].append(_picture(path))
    return {
        "name": folder.name,
        "note": _NOTE.format(about=_about(folder, claims)),
        "short": _in_short(folder, claims, settings),
        "provenance": _inline(_provenance(folder, settings)),
        "devices": manifest.several_devices(manifest.noted(folder)["cells"]),
        "info": dict.fromkeys(_INFO) | (manifest.read(folder) or {}),
        "files": [n for n in (outcomes.NAME, "measurements.csv", "claims.csv", manifest.NAME)
                  if (folder / n).exists()],
        "answers": answers(folder, claims),
        "first": first and _picture(first),
        "claims": claims,
        "disagreements": claims_module.protocol_disagreements(claims),
        "main": [table for table in written if table["name"].startswith("main_")],
        "tables": [table for table in written if not table["name"].startswith("main_")],
        "groups": {words: pictures for words, pictures in groups.items() if pictures},
    }  # fmt: skip


def _picture(path: Path) -> dict:
    try:
        caption = caption_of(path)
    except (OSError, ValueError) as error:
        raise AlloError(f"{path} is not a readable picture: make it again") from error
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    words = caption or path.stem.replace("_", " ")
    return {"name": path.stem, "caption": words, "content": content}


def _within_size(profiles: list[dict]) -> list[dict]:
    """The profiles without the pictures for which the page has no room."""
    room = _MOST_BYTES
    for profile in profiles:
        folded = [picture for pictures in profile["groups"].values() for picture in pictures]
        for picture in [profile["first"], *folded] if profile["first"] else folded:
            room -= len(picture["content"])
            if room < 0:
                picture["content"] = ""
    return profiles


def _table(path: Path) -> dict:
    """A Markdown table as `tables.markdown` writes it: title, one grid, caption."""
    found = {"name": path.stem, "title": path.stem, "grid": [], "notes": []}
    for line in _text(path).splitlines():
        if line.startswith("|"):
            if not set(line) <= set("|-: "):
                cells = line.strip().strip("|").split("|")
                found["grid"].append([_inline(cell.strip()) for cell in cells])
        elif line.startswith("#"):
            found["title"] = _inline(line.lstrip("# "))
        elif line.strip():
            found["notes"].append(_inline(line))
    return found


def _inline(text: str) -> Markup:
    """Escaped text with only our own marks brought back: bold, underlined, code."""
    text = html.escape(text)
    text = re.sub(r"&lt;u&gt;(.*?)&lt;/u&gt;", r"<u>\1</u>", text)
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", text))


# --- README --------------------------------------------------------------------------------------


def readme_block(results_root: str | Path) -> str:
    """The answers of the first committed profile of PROFILES, and where the others' are."""
    folders = [Path(results_root) / profile for profile in PROFILES]
    first, *others = [path for path in folders if (path / outcomes.NAME).exists()] or [None]
    parts = [] if first is None else [_readme_answers(first, f"results/{first.name}")]
    lines = ["Other profiles, each with every claim, part and table:", ""] if others else []
    for path in others:
        short = _in_short(path, claims_module.read(path / "claims.csv"), settings_of(path))
        lines.append(f"- [`{path.name}`](results/{NAME}#{path.name}): {short}")
    parts += ["\n".join(lines)] if others else []
    rule = f"<details><summary>The rule of the verdicts</summary>\n\n{RULE}\n\n</details>"
    return "\n\n".join([BEGIN, *parts, rule, END])


def _readme_answers(folder: Path, link: str) -> str:
    claims = claims_module.read(folder / "claims.csv")
    settings = settings_of(folder)
    lines = [f"**{_in_short(folder, claims, settings)}**", "", _provenance(folder, settings)]
    if figure := _main_figure(folder):
        lines += ["", f"![{caption_of(figure)}]({link}/figures/{figure.name})"]
        lines += ["", f"Redraw it: `./run_all.sh figures {folder.name} {figure.stem}`"]
    lines += ["", "| claim | question | measured | 95% interval | the paper | answer |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for row in answers(folder, claims):
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |")
    note = _NOTE.format(about=_about(folder, claims))
    lines += ["", f"{note} Evidence for each answer, and every other claim: "
              f"[report](results/{NAME}#{folder.name}), [claims]({link}/claims.csv), "
              f"[tables]({link}/tables), [p-values]({link}/tables/verdicts.md)."]  # fmt: skip
    differing = claims_module.protocol_disagreements(claims)
    return "\n".join([*lines, *(["", *[f"- {text}" for text in differing]] if differing else [])])


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
