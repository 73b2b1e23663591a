"""measurements.csv: what the rows say, and that the file comes back as it was written."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allo_lib.errors import AlloError
from allo_lib.evaluation import measurements as m

HEADER = "seed,method,dataset,metric,value,stderr,n\n"
NAMES = st.from_regex(r"\A[a-z][a-z0-9_:]{0,12}\Z")
NUMBERS = st.floats(-1e6, 1e6, allow_nan=False)
ROWS = st.lists(
    st.builds(
        m.Measurement,
        st.integers(0, 99),
        NAMES,
        NAMES,
        NAMES,
        NUMBERS,
        st.floats(0, 1),
        st.integers(0, 10**6),
    ),
    unique_by=lambda row: (row.seed, row.method, row.dataset, row.metric),
)


def test_proportion_has_the_binomial_standard_error():
    row = m.proportion(3, "dpo", "chain", "accuracy", [True, True, True, False])
    assert (row.seed, row.n, row.value) == (3, 4, 0.75)
    assert row.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 4))


def test_proportion_of_nothing_is_an_error():
    with pytest.raises(AlloError, match="no outcomes for dpo on chain"):
        m.proportion(0, "dpo", "chain", "accuracy", [])


def test_average_is_unweighted_and_adds_variances():
    rows = [
        m.Measurement(0, "dpo", "chain", "accuracy", 0.5, 0.03, 10),
        m.Measurement(0, "dpo", "scan", "accuracy", 0.9, 0.04, 1000),
    ]
    mean = m.average(rows)
    assert mean.dataset == "average" and mean.n == 1010
    assert mean.value == pytest.approx(0.7)
    assert mean.stderr == pytest.approx(0.05 / 2)


def test_average_refuses_two_methods_and_one_data_set_twice():
    row = m.Measurement(0, "dpo", "chain", "accuracy", 0.5, 0.0, 1)
    other = m.Measurement(0, "allo", "scan", "accuracy", 0.5, 0.0, 1)
    for bad in ([], [row, other], [row, row]):
        with pytest.raises(AlloError, match="average was given"):
            m.average(bad)


@settings(max_examples=50, deadline=None)
@given(ROWS, st.randoms())
def test_written_rows_come_back_and_order_does_not_matter(tmp_path_factory, rows, random):
    folder = tmp_path_factory.mktemp("rows")
    m.write(folder / "a.csv", rows)
    shuffled = list(rows)
    random.shuffle(shuffled)
    m.write(folder / "b.csv", shuffled)
    assert (folder / "a.csv").read_bytes() == (folder / "b.csv").read_bytes()
    back = m.read(folder / "a.csv")
    assert [(r.seed, r.method, r.dataset, r.metric, r.n) for r in back] == sorted(
        (r.seed, r.method, r.dataset, r.metric, r.n) for r in rows
    )
    m.write(folder / "b.csv", back)
    assert (folder / "a.csv").read_bytes() == (folder / "b.csv").read_bytes()


def test_file_format_is_fixed(tmp_path):
    m.write(tmp_path / "m.csv", [m.Measurement(0, "dpo", "chain", "accuracy", 1 / 3, -0.0, 9)])
    expected = HEADER + "0,dpo,chain,accuracy,0.3333333333,0,9\n"
    assert (tmp_path / "m.csv").read_bytes() == expected.encode()


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "m.csv"
    m.write(path, [m.Measurement(0, "dpo", "chain", "accuracy", 0.5, 0.0, 9)])
    before = path.read_bytes()
    with pytest.raises(AlloError, match="must both be finite"):
        m.write(path, [m.Measurement(0, "dpo", "chain", "accuracy", math.nan, 0.0, 9)])
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.csv"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "an empty file"),
        ("seed,method\n", "starts with 'seed,method'"),
        (HEADER + "0,dpo,chain,accuracy,0.5,0.1\n", "line 2 has 6 cells: expected 7"),
        (HEADER + "zero,dpo,chain,accuracy,0.5,0.1,9\n", "line 2 has a cell that is not a number"),
        (HEADER + "0,dpo,chain,accuracy,nan,0.1,9\n", "must both be finite"),
        (HEADER + "0,dpo,chain,accuracy,0.5,inf,9\n", "must both be finite"),
        (HEADER + "0,dpo,chain,accuracy,0.5,-0.1,9\n", "must be >= 0"),
        (HEADER + "0,dpo,chain,accuracy,0.5,0.1,-9\n", "must be >= 0"),
        (HEADER + "0,<b>,chain,accuracy,0.5,0.1,9\n", "has the name '<b>'"),
        (HEADER + "0,dpo,chain,accuracy,0.5,0.1,9\n" * 2, "twice"),
        (HEADER + '0,"dpo,chain\n', "not valid CSV"),
    ],
)
def test_bad_files_get_one_clear_line(tmp_path, body, message):
    path = tmp_path / "m.csv"
    path.write_text(body)
    with pytest.raises(AlloError, match=message) as caught:
        m.read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_binary_files_are_named(tmp_path):
    with pytest.raises(AlloError, match="does not exist: run the notebooks"):
        m.read(tmp_path / "none.csv")
    (tmp_path / "m.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AlloError, match="cannot be read as UTF-8"):
        m.read(tmp_path / "m.csv")


def test_merge_replaces_seeds_and_keeps_the_others():
    def row(seed, metric):
        return m.Measurement(seed, "dpo", "chain", metric, 0.5, 0.0, 1)

    merged = m.merge([row(0, "a"), row(1, "a"), row(1, "b")], [row(1, "c"), row(2, "a")])
    assert [(r.seed, r.metric) for r in merged] == [(0, "a"), (1, "c"), (2, "a")]
    assert m.seeds_of(merged) == [0, 1, 2]
