"""The report and README's block: self-contained, within their bounds, and in agreement."""

import base64
import hashlib
import math
import os
import re
import shutil
import subprocess
import sys

import conftest
import numpy as np
import pytest
from scipy import stats
from test_claims import EFFICIENCY

from allo_lib.cli import cli
from allo_lib.errors import AlloError
from allo_lib.evaluation import claims, outcomes, published
from allo_lib.evaluation.comparisons import Domain
from allo_lib.evaluation.outcomes import REWARD
from allo_lib.evaluation.verdicts import RULE
from allo_lib.report import figures, report
from allo_lib.report.figure_style import VERDICT_STYLE
from allo_lib.study import manifest
from tests import synthetic_results
from tests.refusals import refused

ROOT = conftest.ROOT
MANIFEST = {"profile": "tiny", "profile_hash": "0" * 64, "seeds": [0], "runs": {}, "files": {}}
ALONE = "One SFT model decides nothing: no claim about methods has a verdict here"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Results of a profile of three SFT models, and of one of a single model."""
    root = tmp_path_factory.mktemp("root")
    for name, models in (("tiny-full", (0, 1, 2)), ("tiny", (0,))):
        synthetic_results.write(root / name, models, n=500, pairs=100)
        (root / name / "tables").mkdir()
        if models == (0,):
            lines = [EFFICIENCY[0], *[row.values() for row in EFFICIENCY]]
            text = "".join(",".join(line) + "\n" for line in lines)
            (root / name / "tables" / "efficiency.csv").write_text(text)
        settings = {"settings": {"models": len(models)}}
        manifest.write_json(root / name / manifest.NAME, MANIFEST | settings)
        report.rebuild(root / name)
    return root


def page_of(root) -> conftest.Page:
    return conftest.Page((root / report.NAME).read_text(encoding="utf-8"))


def test_the_report_is_one_self_contained_page_of_all_profiles(root):
    page = page_of(root)
    sources, links, ids = (page.values(name) for name in ("src", "href", "id"))
    assert sources and all(s.startswith("data:image/png;base64,") for s in sources)
    inside = [link[1:] for link in links if link.startswith("#")]
    assert len(inside) > 10 and set(inside) <= set(ids) and len(ids) == len({*ids})
    others = {link for link in links if not link.startswith(("#", "https://arxiv.org/"))}
    assert others and all((root / link).is_file() for link in others)
    pictures = 0
    for name in ("tiny-full", "tiny"):
        for claim in claims.read(root / name / "claims.csv"):
            assert claim.effect is None or claim.evidence in page.words
        pictures += len(list((root / name / "figures").glob("*.png")))
    assert page.tags.count("img") == pictures
    assert page.tags.count("script") == 1 and not {"link", "iframe"} & {*page.tags}
    assert (root / report.NAME).stat().st_size < 2_000_000
    assert claims.read(root / "tiny" / "claims.csv")[-1].verdict == "supported"  # costs
    # No script runs but the page's own.
    text = (root / report.NAME).read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", text, re.S)[1].encode()
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'" in text
    # The profile that says most comes first, its answer above the contents.
    first = page.words.index("independent SFT models: ")
    assert first < page.words.index("Contents") < page.words.index(ALONE)


def test_the_rule_stands_wherever_verdicts_do_and_verdicts_are_told_apart(root):
    page, text = page_of(root), (root / report.NAME).read_text(encoding="utf-8")
    assert page.words.count(RULE.replace("*", "")) == 3  # once, and with each table of p-values
    for verdict in VERDICT_STYLE:
        assert f".{verdict.replace(' ', '-')} {{ color" in text
    assert '<span class="verdict contradicted">contradicted</span>' in text
    assert RULE in report.readme_block(root)


@pytest.mark.parametrize("count", [1, 2])
def test_models_stand_beside_the_range_of_as_many_more_of_the_committed_study(count, tmp_path):
    effects = np.array([0.010, 0.025, 0.003, 0.019])
    mean, half = effects.mean(), stats.t.ppf(0.975, 3) * effects.std(ddof=1)
    both = half * stats.t.ppf(1 - 0.025 / 2, 3) / stats.t.ppf(0.975, 3)  # of two parts, together
    halves = {"C4": half, "C2": half, "C2.dpo": both, "C2.dpo_last10": both, "C10": half}
    cited = [claims.Claim(name, "", mean, mean - one / 2, mean + one / 2)
             for name, one in halves.items()]  # / 2: of a mean of four  # fmt: skip
    claims.write(tmp_path / "claims.csv", [*cited, claims.Claim("C9", "")])
    rows = [outcomes.Measurement(seed, "allo", "a", "accuracy", 0.5, 0.0, 1) for seed in range(6)]
    outcomes.write_measurements(tmp_path / "measurements.csv", rows)
    fixed = {"settings": {"models": 4, "first_seed": 1}}  # seeds 0 and 5 are not counted
    manifest.write_json(tmp_path / manifest.NAME, MANIFEST | fixed)
    edge = half * math.sqrt(1 / count + 1 / 4)  # both means vary
    for here, inside in ((mean + 0.99 * edge, "yes"), (mean - 1.01 * edge, "no")):
        own = [claims.Claim(name, "", here) for name in (*halves, "C9", "C3")]
        assert report.beside(own, tmp_path, 0) == []
        found = report.beside(own, tmp_path, count)
        # Costs are of processes on one machine, and not of SFT models.
        assert [row["id"] for row in found] == ["C4", "C2.dpo", "C2.dpo_last10"]
        for row in found:
            assert row["inside"] == inside
            ends = [float(end) for end in row["as many more models"].strip("[]").split(", ")]
            assert ends == pytest.approx([100 * (mean - edge), 100 * (mean + edge)], abs=0.06)


def test_a_no_to_the_smallest_of_several_effects_names_those_that_are_below(tmp_path):
    parts = [claims.Claim("C5.sft", "", -0.05, -0.14, 0.05),
             claims.Claim("C5.a2c", "", -0.04, -0.08, -0.01, verdict="contradicted")]  # fmt: skip
    whole = claims.Claim("C5", "", -0.05, -0.11, -0.01, verdict="contradicted")
    (row,) = report.answers(tmp_path, [whole, *parts])
    assert row[0] == "C5" and row[-1] == "no: PPO A2C"


def test_the_headline_is_about_the_first_domain_and_counts_the_models_that_are_there(tmp_path):
    made = synthetic_results.joined(("questions", ("ecqa",)), ("helpfulness", ()), models=(0, 1))
    report.figures.draw(made, (), (), {}, tmp_path / "figures")
    rows = [outcomes.Measurement(seed, "allo", "ecqa", "accuracy", 0.5, 0.0, 1) for seed in (0, 1)]
    outcomes.write_measurements(tmp_path / "measurements.csv", rows)
    short = report._in_short(tmp_path, claims.compute(made), {"models": 3})
    assert "C1 to C9 on questions, " in short and "on 2 of 3 independent SFT models" in short
    assert "9 undecided" not in short and ":helpfulness" not in short
    plain = report._in_short(tmp_path, claims.compute(synthetic_results.results()), {"models": 2})
    assert "C1 to C9, " in plain and "on 2 independent SFT models" in plain


def test_without_a_manifest_nobody_knows_how_many_models_a_verdict_needs(tmp_path):
    synthetic_results.write(tmp_path / "made", n=50, pairs=20)
    with refused(f"{tmp_path / 'made'} has no manifest.json: run its profile"):
        report.remake(tmp_path / "made")
    assert not (tmp_path / "made" / "claims.csv").exists()


def test_pictures_that_do_not_fit_into_the_page_are_linked(root, tmp_path, monkeypatch):
    shutil.copytree(root / "tiny", tmp_path / "tiny")
    monkeypatch.setattr(report, "_MOST_BYTES", 100_000)
    report.build(tmp_path / "tiny")
    fewer = page_of(tmp_path)
    names = {f"tiny/figures/{path.name}" for path in (tmp_path / "tiny" / "figures").glob("*.png")}
    linked = names & {*fewer.values("href")}
    assert linked and 0 < fewer.tags.count("img") == len(names) - len(linked)


def test_a_report_of_somebody_else_is_kept_and_broken_neighbours_are_named(root, tmp_path):
    shutil.copytree(root / "tiny", tmp_path / "tiny")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / outcomes.NAME).write_bytes(b"")
    report.build(tmp_path / "tiny")
    assert "Left out, as they have no claims that can be read: other." in page_of(tmp_path).words
    (tmp_path / report.NAME).write_text("mine")
    with pytest.raises(AlloError, match="is not a report of this project"):
        report.build(tmp_path / "tiny")
    assert (tmp_path / report.NAME).read_text() == "mine"


def test_provenance_names_the_models_that_the_profile_fixes(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "measured_seeds", lambda folder: [0, 8, 9, 10])
    settings = {"first_seed": 8, "models": 2}  # as where there is no manifest yet
    assert "SFT models of seeds 8, 9, each" in report._provenance(tmp_path, settings)


def test_bad_inputs_get_one_line(tmp_path):
    with pytest.raises(AlloError, match="does not exist"):
        report.rebuild(tmp_path / "a")
    outcomes.write_measurements(tmp_path / "measurements.csv", [])
    with pytest.raises(AlloError, match="has no outcomes.parquet: run"):
        report.rebuild(tmp_path)
    (tmp_path / "e.csv").write_text("variant,device\na,b\n")
    with pytest.raises(AlloError, match="lacks columns"):
        report.read_efficiency(tmp_path / "e.csv")
    (tmp_path / "own").mkdir()
    with pytest.raises(AlloError, match="run notebook 06"):
        report.build(tmp_path / "own")


def test_the_paper_stands_beside_with_its_numbers_of_the_same_data_sets():
    allo = published.main_results()["allo"]
    for domain, number, title in (
        (Domain("x", ("ecqa", "qasc")), (allo["ecqa"] + allo["qasc"]) / 2, "paper, ecqa, qasc"),
        (Domain("x", ("chain",)), allo["qa_avg"], "paper, mean of 4 question sets"),
        (Domain("x", ("x",), REWARD), allo["instructions_avg"],
         "paper, instruction following (win rate)"),
    ):  # fmt: skip
        numbers, told = figures.paper_beside(domain)
        assert numbers["allo"] == pytest.approx(number) and told == title


# --- README --------------------------------------------------------------------------------------


def test_readmes_block_has_the_answers_and_the_rest_is_kept(root, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{report.BEGIN}\nbefore\n{report.END}\n\nThe end.\n")
    assert report.readme_block(root) not in readme.read_text()
    report.update_readme(readme, root)
    text = readme.read_text()
    assert (
        text.startswith("# Title\n") and text.endswith("\n\nThe end.\n") and "before\n" not in text
    )
    assert report.readme_block(root) in readme.read_text()
    found = {claim.id: claim for claim in claims.read(root / "tiny-full" / "claims.csv")}
    assert found.keys() > {"C10"} and found["C10"].effect is None
    for name, question in report.QUESTIONS.items():
        effect, interval = claims.effect_text(found[name])
        shown = [line for line in text.splitlines() if line.startswith(f"| {name} | {question} |")]
        assert len(shown) == (found[name].effect is not None)
        assert all(f"| {effect}" in line and f"| {interval} |" in line for line in shown)
    (row,) = [line for line in text.splitlines() if "... than on the last 10%?" in line]
    assert row.endswith("| yes |") and "seeds 0, 1, 2" in text
    assert f"(results/report.html#tiny): {report._ALONE}" in text
    primary = [c for c in found.values() if c.family == "primary" and c.id == c.whole]
    missing = [c.id for c in primary if c.effect is None]
    found = {v: [c.id for c in primary if c.verdict == v] for v in report.ANSWERS}
    found["undecided"] = [claim for claim in found["undecided"] if claim not in missing]
    found["not measured"] = missing
    counted = [f"{len(ids)} {words} ({', '.join(ids)})" for words, ids in found.items() if ids]
    assert f"on 3 independent SFT models: {', '.join(counted)}.**" in text
    assert "(results/tiny-full/figures/main_miniature.png)" in text
    for anchor in re.findall(r"\(results/report\.html#(.+?)\)", text):
        assert anchor in page_of(root).values("id")
    readme.write_text(text.replace("| yes |", "| no |", 1))
    assert report.readme_block(root) not in readme.read_text()
    readme.write_text("# Title\n")
    with pytest.raises(AlloError, match="lacks the markers"):
        report.update_readme(readme, root)


def test_the_main_figure_is_that_of_the_first_domain(root, tmp_path):
    folder = shutil.copytree(root / "tiny", tmp_path / "tiny")
    (folder / "figures" / "main_a.png").write_bytes(b"")  # earlier by name
    assert "(results/tiny/figures/main_miniature.png)" in report.readme_block(tmp_path)
    assert ALONE in report.readme_block(tmp_path)


# --- the committed results -----------------------------------------------------------------------


def test_readme_shows_the_committed_results():
    assert report.readme_block(ROOT / "results") in (ROOT / "README.md").read_text(), (
        "README.md and results/ disagree: run ./run_all.sh figures"
    )


# --- `run_all.sh figures`, from the committed files, to the byte ----------------------------------

COMMITTED = ROOT / "results" / "tiny"
DRAWN = ("claims", "main_miniature", "relative_change")


def copied(source, target):
    ignored = shutil.ignore_patterns(manifest.STORE, "notebooks")
    return shutil.copytree(source, target, ignore=ignored)


@pytest.fixture
def folder(tmp_path):
    return copied(COMMITTED, tmp_path / "tiny")


@pytest.mark.slow
def test_all_are_made_again_as_committed_without_torch(tmp_path):
    code = "import sys; from allo_lib.cli import cli; status = cli.main(sys.argv[1:]); "
    code += "sys.exit(status or ('torch' in sys.modules and 'torch was loaded'))"
    results = [path.parent for path in (ROOT / "results").glob(f"*/{outcomes.NAME}")]
    folders = [copied(path, tmp_path / path.name) for path in results]
    assert folders
    for folder, committed in zip(folders, results, strict=True):
        gone = [folder / "figures" / f"{name}{end}" for name in DRAWN for end in (".png", ".pdf")]
        gone = [path for path in gone if path.exists()]
        gone += [folder / "claims.csv", *(folder / "tables").glob("*.md")]
        for path in gone:
            path.unlink()
        command = [sys.executable, "-c", code, "figures", folder.name, "--out", str(folder)]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        assert all(f"wrote {path}\n" in ended.stdout for path in gone)
        made = [*gone, *(folder / "tables").glob("*.csv"), folder / manifest.NAME]
        for path in made:
            same = committed / path.relative_to(folder)
            assert path.read_bytes() == same.read_bytes(), f"{same} is out of date"
    report_of = (root / report.NAME for root in (tmp_path, ROOT / "results"))
    assert len({path.read_bytes() for path in report_of}) == 1, "results/report.html is out of date"


def test_one_is_made_again_and_nothing_else(folder, monkeypatch, capsys):
    def remake(copy):
        made = [copy / "figures" / "a.png", copy / "tables" / "a.csv", copy / "tables" / "b.csv"]
        for path in made:
            path.write_text("new")
        shutil.copy(COMMITTED / "figures" / "claims.png", copy / "figures" / "a.png")
        return made

    monkeypatch.setattr(report, "remake", remake)
    (folder / "tables" / "b.csv").write_text("old")
    assert cli.main(["figures", "tiny", "a", "--out", str(folder)]) == 0
    assert (folder / "figures" / "a.png").is_file()
    assert (folder / "tables" / "a.csv").read_text() == "new"
    assert (folder / "tables" / "b.csv").read_text() == "old"
    told = manifest.read(folder)  # knows what was made again, and by which commit
    files = manifest.file_hashes(folder)
    assert told["files"]["tables/a.csv"] == files["tables/a.csv"] and "redrawn" in told
    assert "tables/b.csv" not in told["files"]
    assert cli.main(["figures", "tiny", "c", "--out", str(folder)]) == 2
    assert capsys.readouterr().err == ("run_all: no figure or table 'c': expected one of a, b\n")


# --- in a browser --------------------------------------------------------------------------------

PROBE = """<script>
const told = [], root = document.documentElement;
addEventListener("error", (e) => told.push(e.message));
addEventListener("load", () => {
  told.push("wider by " + (root.scrollWidth - root.clientWidth));
  const head = document.querySelector("th button").closest("th");
  head.parentNode.children[3].querySelector("button").click();
  const cells = [...head.closest("table").tBodies[0].rows].map((row) => row.cells[3].textContent);
  told.push("falling " + cells.map(parseFloat).filter((x) => !isNaN(x)).join(" "));
  document.title = told.join("; ");
});
</script>"""


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser_nothing_overflows_and_the_main_table_sorts(root, tmp_path, width):
    text = (root / report.NAME).read_text(encoding="utf-8")
    # In a frame, as a window of a headless browser is never narrower than 500 pixels; without the
    # policy that keeps every script but the page's own from running.
    text = re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', PROBE, text)
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    frame = f'<iframe src="page.html" width="{width}" height="2000"></iframe>'
    watch = "<script>onload = () => { document.title = frames[0].document.title }</script>"
    (tmp_path / "frame.html").write_text(f"<!doctype html><title></title>{frame}{watch}")
    command = [
        conftest.chromium(), "--headless", "--no-sandbox", "--disable-gpu",
        "--disable-dev-shm-usage", f"--user-data-dir={tmp_path / 'browser'}",
        "--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom",
        (tmp_path / "frame.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300,
        env=os.environ | {"HOME": str(tmp_path)},
    )  # fmt: skip
    overflow, falling = re.search(r"<title>(.*?)</title>", done.stdout)[1].split("; ")
    assert overflow == "wider by 0"
    numbers = [float(x) for x in falling.removeprefix("falling ").split()]
    assert len(numbers) == 4 and numbers == sorted(numbers, reverse=True)
