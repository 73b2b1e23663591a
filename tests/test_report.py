"""The report and README block: rebuilt from committed files alone, self-contained, escaped."""

import base64
import csv
import html.parser
import subprocess
import sys

import pytest

from allo_lib.errors import AlloError
from allo_lib.evaluation import claims, comparisons, outcomes, published
from allo_lib.evaluation.verdicts import RULE
from allo_lib.report import report
from allo_lib.report.figure_style import VERDICT_STYLE
from allo_lib.study import manifest
from tests import synthetic_results

MANIFEST = {"profile": "tiny", "profile_hash": "0" * 64, "seeds": [0], "runs": {}, "files": {}}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("root") / "tiny"
    synthetic_results.write(folder, (0,))
    report.rebuild(folder)
    return folder


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.words = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for key, value in attributes if key in ("src", "href")]

    def handle_data(self, data):
        self.words += data


def files_of(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_rebuilding_needs_only_outcomes_and_measurements_and_no_torch(results, tmp_path):
    before = files_of(results)
    assert {
        "claims.csv",
        "report.html",
        "tables/main_miniature.md",
        "figures/claims.png",
        "figures/main_miniature.pdf",
        "figures/relative_change.png",
        "tables/comparisons.csv",
        "tables/verdicts.md",
    } <= set(map(str, before))
    (tmp_path / "tiny").mkdir()
    for name in ("outcomes.parquet", "measurements.csv"):
        (tmp_path / "tiny" / name).write_bytes((results / name).read_bytes())
    code = (
        "import sys, time\n"
        "sys.modules['torch'] = sys.modules['transformers'] = None  # importing either raises\n"
        "from allo_lib.report import report\n"
        "start = time.process_time()\n"
        "report.rebuild(sys.argv[1])\n"
        "print(time.process_time() - start)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "tiny")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 60  # of CPU time: seconds, but not on a busy machine
    assert files_of(tmp_path / "tiny") == before


def test_report_is_one_self_contained_page(results):
    page = Page((results / "report.html").read_text(encoding="utf-8"))
    assert page.sources and all(s.startswith("data:image/png;base64,") for s in page.sources)
    assert not {"script", "link", "iframe"} & set(page.tags)
    for claim in claims.read(results / "claims.csv"):
        assert claim.evidence in page.words
    assert page.tags.count("img") == len(list((results / "figures").glob("*.png")))


def test_figures_of_single_seeds_come_from_the_lowest_one(results, tmp_path):
    folder = tmp_path / "tiny"
    (folder / "figures").mkdir(parents=True)
    (folder / "claims.csv").write_bytes((results / "claims.csv").read_bytes())
    picture = (results / "figures" / "claims.png").read_bytes()
    for name in ("claims", "main_x", "a_seed10", "a_seed3", "a_seed4", "b_seed10", "seed4_all"):
        (folder / "figures" / f"{name}.png").write_bytes(picture + name.encode())
    report.build(folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    shown = {base64.b64decode(s.split(",")[1])[len(picture) :] for s in Page(text).sources}
    assert shown == {b"claims", b"main_x", b"a_seed3", b"seed4_all"}
    assert "those of seed 3; those of 4, 10 are in the folder" in text


def test_report_escapes_what_files_contain(results, tmp_path):
    (tmp_path / "tables").mkdir()
    evil = "<script>alert(1)</script>"
    claim = claims.Claim("C1", evil, 0.1, None, None, "accuracy", "undecided", evil)
    claims.write(tmp_path / "claims.csv", [claim])
    table = f"# {evil}\n\n| a | b |\n| --- | --- |\n| **1** | {evil} |\n\nNote {evil}\n"
    (tmp_path / "tables" / "x.md").write_text(table)
    page = Page(report.build(tmp_path).read_text(encoding="utf-8"))
    assert "script" not in page.tags and page.words.count(evil) == 5
    assert page.tags.count("b") == 1 + RULE.count("**") / 2 and page.tags.count("table") == 2


def test_efficiency_table_adds_its_claim_and_figure(tmp_path):
    from tests.test_claims import EFFICIENCY

    synthetic_results.write(tmp_path, (0,), n=20)
    (tmp_path / "tables").mkdir()
    lines = [",".join(EFFICIENCY[0]), *[",".join(row.values()) for row in EFFICIENCY]]
    (tmp_path / "tables" / "efficiency.csv").write_text("\n".join(lines) + "\n")
    report.rebuild(tmp_path)
    assert claims.read(tmp_path / "claims.csv")[-1].verdict == "supported"
    assert (tmp_path / "figures" / "efficiency.png").exists()


def test_bad_inputs_get_one_line(tmp_path):
    with pytest.raises(AlloError, match="does not exist"):
        report.rebuild(tmp_path)
    outcomes.write_measurements(tmp_path / "measurements.csv", [])
    with pytest.raises(AlloError, match="has no outcomes.parquet: run"):
        report.rebuild(tmp_path)
    (tmp_path / "e.csv").write_text("variant,device\na,b\n")
    with pytest.raises(AlloError, match="lacks columns"):
        report.read_efficiency(tmp_path / "e.csv")
    with pytest.raises(AlloError, match="run notebook 06"):
        report.build(tmp_path)


def test_readme_block_is_replaced_and_the_rest_kept(results, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nThe end.\n")
    assert not report.readme_is_current(readme, results.parent)
    report.update_readme(readme, results.parent)
    text = readme.read_text()
    assert text.startswith("# Title\n") and text.endswith("\n\nThe end.\n") and "old" not in text
    assert report.readme_is_current(readme, results.parent)
    found = {claim.id: claim for claim in claims.read(results / "claims.csv")}
    assert found.keys() > {"C10"} and found["C10"].effect is None
    for name, question in report.QUESTIONS.items():
        effect, interval = report.effect_text(found[name])
        shown = [line for line in text.splitlines() if line.startswith(f"| {question} |")]
        assert len(shown) == (found[name].effect is not None)
        assert all(f"| {effect}" in line and f"| {interval} |" in line for line in shown)
    readme.write_text(text.replace("| undecided |", "| yes |", 1))
    assert not report.readme_is_current(readme, results.parent)


def test_readme_without_markers_is_named(results, tmp_path):
    (tmp_path / "README.md").write_text("# Title\n")
    with pytest.raises(AlloError, match="lacks the markers"):
        report.update_readme(tmp_path / "README.md", results.parent)


def test_the_paper_stands_beside_with_its_numbers_of_the_same_data_sets():
    with open(published.PAPER_DIR / "main_results.csv", encoding="utf-8", newline="") as file:
        (allo,) = [row for row in csv.DictReader(file) if row["method"] == "+ ALLO"]
    domain = comparisons.Domain("questions", ("ecqa", "qasc"))
    numbers, title = report._paper_beside(domain, None)
    assert numbers["allo"] == pytest.approx((float(allo["ecqa"]) + float(allo["qasc"])) / 200)
    assert title == "paper, ecqa, qasc"
    numbers, _ = report._paper_beside(comparisons.Domain("miniature", ("chain",)), None)
    assert numbers["allo"] == pytest.approx(float(allo["qa_avg"]) / 100)


def test_readme_shows_the_main_figure_of_the_first_domain(tmp_path):
    folder = tmp_path / "tiny"
    synthetic_results.write(folder, (0,), n=20)
    report.rebuild(folder)
    (folder / "figures" / "main_a.png").write_bytes(b"")  # earlier by name
    assert "(results/tiny/figures/main_miniature.png)" in report.readme_block(tmp_path)


def test_the_rule_stands_wherever_verdicts_do(results):
    page = Page((results / "report.html").read_text(encoding="utf-8"))
    plain = RULE.replace("*", "")
    assert page.words.count(plain) == 2  # above the claims, and below the table of their p-values
    assert RULE in report.readme_block(results.parent)
    assert RULE in (results / "tables" / "verdicts.md").read_text(encoding="utf-8")


def test_verdicts_are_told_apart_in_the_report_and_tags_in_readme(tmp_path):
    folder = tmp_path / "tiny"
    synthetic_results.write(folder)
    report.rebuild(folder, models=3)
    text = (folder / "report.html").read_text(encoding="utf-8")
    for verdict in VERDICT_STYLE:
        assert f".{verdict.replace(' ', '-')} {{ color" in text
    assert '<td class="contradicted">contradicted</td>' in text
    assert "One SFT model decides nothing: no claim" not in text
    manifest.write_json(folder / manifest.NAME, MANIFEST | {"settings": {"models": 3}})
    assert report.models_of(folder) == 3
    before = files_of(folder)
    report.rebuild(folder)  # the number of models from the manifest
    assert files_of(folder) == before
    block = report.readme_block(tmp_path)
    assert "seeds 0, 1, 2" in block and "One SFT model decides nothing: no claim" not in block
    found = [
        c for c in claims.read(folder / "claims.csv") if c.family == "primary" and c.id == c.whole
    ]
    counted = [f"{n} {v}" for v in report.ANSWERS
               if (n := sum(claim.verdict == v for claim in found))]  # fmt: skip
    assert f"on 3 independent SFT models: {', '.join(counted)}.**" in block
    (row,) = [line for line in block.splitlines() if "... than on the last 10%?" in line]
    assert row.endswith("| yes |")
    old = ("reproduced", "inconclusive", "bootstrap", "after Holm")
    assert not any(word in block for word in old)


def test_the_papers_numbers_are_told_when_broken(tmp_path):
    for content, told in ((b"\xff", "cannot be read"), (b"a,b\n1,2\n", "has the row"),
                          (b"method,ecqa\n+ DPO,high\n", "not a number"),
                          (b"method,ecqa\n+ DPO,1\n", "lacks rows")):  # fmt: skip
        (tmp_path / "main_results.csv").write_bytes(content)
        with pytest.raises(AlloError, match=told):
            published.main_results(tmp_path)


def test_a_profile_of_one_model_says_that_it_decides_nothing(results):
    told = "One SFT model decides nothing: no claim about methods has a verdict here"
    assert told in (results / "report.html").read_text(encoding="utf-8")
    assert told in report.readme_block(results.parent)
