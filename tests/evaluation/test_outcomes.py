"""The two files of results, and the replicates of a study that they come from."""

import dataclasses
import math

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_study import DOMAIN, open_study

from allo_lib.data.pairs import train_split
from allo_lib.errors import AlloError
from allo_lib.evaluation import outcomes
from allo_lib.evaluation.outcomes import Measurement
from allo_lib.profiles.config import Replicates
from allo_lib.study import results, runs, training
from allo_lib.study.study import Study

METHODS = ["dpo", "dpo_top10"]


@pytest.fixture(scope="module")
def replicated(tmp_path_factory):
    study = open_study(
        tmp_path_factory.mktemp("replicated"), methods=METHODS, ablations=[], stability=["halves"],
        replicates__pair_sets=2, replicates__orders=2, domains__miniature__pairs__train=8,
        domains__miniature__batch_size=2,
    )  # fmt: skip
    return study, results.update(study, [study.seed])


def test_pair_sets_share_no_question_and_orders_share_all(replicated):
    study, _ = replicated
    rows = study.pairs(DOMAIN).rows
    ids = [{row["id"] for row in rows[train_split(number)]} for number in (0, 1)]
    assert all(len(one) > 3 for one in ids) and not ids[0] & ids[1]
    assert not (ids[0] | ids[1]) & {r["id"] for s in ("mask", "heldout") for r in rows[s]}
    assert [study.at(r).train for r in study.replicates] == ["train", "train", "train1", "train1"]


def test_every_replicate_is_another_run_at_the_rates_of_the_first_from_one_sft_model(replicated):
    study, _ = replicated
    found = [training.result(study.at(r), DOMAIN, "dpo") for r in study.replicates]
    assert len({tuple(one["rates"]) for one in found}) == 1
    assert len({tuple(one["loss"][-1]) for one in found}) == len(study.replicates) == 4
    for kind, count in {"sft": 1, "pairs": 1, "scores": 3}.items():  # of all pairs, of either half
        assert len(list((study.store.folder / kind).iterdir())) == count, kind


def test_measurements_are_the_means_that_the_outcomes_give(replicated):
    study, rows = replicated
    told = outcomes.read(study.results_dir / outcomes.NAME)
    assert set(told["method"]) == {"sft_base", *METHODS} and set(told["replicate"]) == {0, 1, 2, 3}
    problems = told[told["margin"].isna()]
    per_run = problems.groupby(["method", "dataset", "replicate"], observed=True)["right"].mean()
    means = per_run.groupby(level=["method", "dataset"], observed=True).mean()
    measured = {(r.method, r.dataset): r.value for r in rows if r.metric == "accuracy"}
    for (method, dataset), mean in means.items():
        assert measured[method, dataset] == pytest.approx(mean), (method, dataset)
    pairs = told[told["margin"].notna()]
    assert (pairs["right"] == (pairs["margin"] > 0)).all()
    right = pairs.groupby("method", observed=True)["right"].mean()
    ranked = {r.method: r.value for r in rows if r.metric == "reward_accuracy"}
    assert ranked == pytest.approx({m: v for m, v in right.items() if m in ranked})
    answered = 1 - problems.groupby("method", observed=True)["answered"].mean()
    cut = {r.method: r.value for r in rows if r.metric == "no_answer" and r.dataset == "average"}
    assert cut == pytest.approx(dict(answered.items()), abs=1e-6)


def test_methods_that_are_run_once_have_the_first_replicate_alone(tiny_study):
    profile = dataclasses.replace(tiny_study.profile, replicates=Replicates(2, 2, ("npo",)))
    study = Study(profile, 0, tiny_study.results_dir, None)
    assert list(study.replicates_of("npo")) == [0]
    assert list(study.replicates_of("dpo")) == [0, 1, 2, 3]
    having = ["npo" in runs.methods_of(study.at(r), DOMAIN) for r in study.replicates]
    assert having == [True, False, False, False]


def test_a_mean_is_over_all_replicates_of_its_method_or_is_not_told():
    def row(method, metric, value):
        return Measurement(0, method, "toy", metric, value, 0.0, 1)

    runs = [[row("dpo", "accuracy", 0.2 * r), row("dpo", "dev_score", 0.5)] for r in range(4)]
    runs[0] += [row("dpo", "displacement", 1.0), row("npo", "accuracy", 0.7)]
    told = {(r.method, r.metric): r.value for r in results.mean_rows(runs)}
    # A displacement that three runs lack, as of weights that are NaN, is no mean of the four.
    assert told == pytest.approx(
        {("dpo", "accuracy"): 0.3, ("dpo", "dev_score"): 0.5, ("npo", "accuracy"): 0.7}
    )


# --- outcomes.parquet ----------------------------------------------------------------------------


def table(*rows) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=outcomes.COLUMNS)


A = (0, 0, "dpo", "toy", "chain", "p1", True, True, None)
B = (0, 0, "dpo", "toy", "toy", "h1", False, True, -0.5)


def test_the_file_holds_what_was_written_in_an_order_of_its_own(tmp_path):
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    outcomes.write(paths[0], table(A, B))
    outcomes.write(paths[1], table(B, A))
    assert paths[0].read_bytes() == paths[1].read_bytes()
    read = outcomes.read(paths[0])
    assert list(read.columns) == outcomes.COLUMNS
    assert read["right"].tolist() == [True, False] and read["margin"].tolist()[1] == -0.5
    outcomes.write(paths[1], outcomes.merge(read, table((1, *A[1:]))))
    assert outcomes.read(paths[1])["model"].tolist() == [0, 0, 1]
    outcomes.write(paths[1], outcomes.merge(read, table((*A[:6], False, True, None))))
    assert outcomes.read(paths[1])["right"].tolist() == [False]  # the pair is of the same domain


def test_an_outcome_given_twice_or_a_file_of_another_kind_is_refused(tmp_path):
    with pytest.raises(AlloError, match="is given twice"):
        outcomes.write(tmp_path / "a.parquet", table(A, A))
    assert not list(tmp_path.iterdir())
    (tmp_path / "b.parquet").write_text("no parquet")
    with pytest.raises(AlloError, match="not a readable Parquet file"):
        outcomes.read(tmp_path / "b.parquet")
    assert outcomes.read(tmp_path / "none.parquet").empty


# --- measurements.csv ----------------------------------------------------------------------------

HEADER = "seed,method,dataset,metric,value,stderr,n\n"
ROW = "0,dpo,chain,accuracy,0.5,0.1,9\n"
NAMES = st.from_regex(r"\A[a-z][a-z0-9_:]{0,12}\Z")
NUMBERS = st.floats(-1e6, 1e6, allow_nan=False)
ROWS = st.lists(
    st.builds(Measurement, st.integers(0, 99), NAMES, NAMES, NAMES, NUMBERS, st.floats(0, 1),
              st.integers(0, 10**6)),
    unique_by=lambda row: (row.seed, row.method, row.dataset, row.metric),
)  # fmt: skip


def test_a_proportion_and_an_average_have_their_standard_errors():
    row = outcomes.proportion(3, "dpo", "chain", "accuracy", [True, True, True, False])
    assert (row.seed, row.n, row.value) == (3, 4, 0.75)
    assert row.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    with pytest.raises(AlloError, match="no outcomes for dpo on chain"):
        outcomes.proportion(0, "dpo", "chain", "accuracy", [])
    rows = [
        Measurement(0, "dpo", "chain", "accuracy", 0.5, 0.03, 10),
        Measurement(0, "dpo", "scan", "accuracy", 0.9, 0.04, 1000),
    ]
    mean = outcomes.average(rows)
    assert (mean.dataset, mean.n) == ("average", 1010)
    assert (mean.value, mean.stderr) == pytest.approx((0.7, 0.05 / 2))


@settings(max_examples=50, deadline=None)
@given(ROWS, st.randoms())
def test_written_rows_come_back_and_order_does_not_matter(tmp_path_factory, rows, random):
    folder = tmp_path_factory.mktemp("rows")
    outcomes.write_measurements(folder / "a.csv", rows)
    random.shuffle(rows)
    outcomes.write_measurements(folder / "b.csv", rows)
    assert (folder / "a.csv").read_bytes() == (folder / "b.csv").read_bytes()
    back = outcomes.read_measurements(folder / "a.csv")
    assert [(r.seed, r.method, r.dataset, r.metric, r.n) for r in back] == sorted(
        (r.seed, r.method, r.dataset, r.metric, r.n) for r in rows
    )
    outcomes.write_measurements(folder / "b.csv", back)
    assert (folder / "a.csv").read_bytes() == (folder / "b.csv").read_bytes()


def test_the_format_is_fixed_and_a_failed_write_leaves_the_old_file(tmp_path):
    path, row = tmp_path / "m.csv", Measurement(0, "dpo", "chain", "accuracy", 1 / 3, -0.0, 9)
    outcomes.write_measurements(path, [row])
    expected = HEADER + "0,dpo,chain,accuracy,0.3333333333,0,9\n"
    with pytest.raises(AlloError, match="must both be finite"):
        outcomes.write_measurements(path, [dataclasses.replace(row, value=math.nan)])
    assert path.read_bytes() == expected.encode()
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.csv"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (None, "does not exist: run the notebooks"),
        ("", "an empty file"),
        ("seed,method\n", "has columns 'seed,method'"),
        (HEADER + "0,dpo,chain,accuracy,0.5,0.1\n", "line 2 cannot be read"),
        (HEADER + ROW.replace("0,dpo", "zero,dpo"), "line 2 cannot be read .*'zero'"),
        (HEADER + ROW.replace("0.5", "nan"), "must both be finite"),
        (HEADER + ROW.replace("0.1", "inf"), "must both be finite"),
        (HEADER + ROW.replace("0.1", "-0.1"), "must be >= 0"),
        (HEADER + ROW.replace(",9", ",-9"), "must be >= 0"),
        (HEADER + ROW.replace("dpo", "<b>"), "has the name '<b>'"),
        (HEADER + ROW * 2, "twice"),
        (HEADER + '0,"dpo,chain\n', "is no CSV file in UTF-8"),
        ("\udcff", "is no CSV file in UTF-8"),
    ],
)
def test_bad_files_get_one_clear_line(tmp_path, body, message):
    path = tmp_path / "m.csv"
    if body is not None:
        path.write_text(body, errors="surrogateescape")
    with pytest.raises(AlloError, match=message) as caught:
        outcomes.read_measurements(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
