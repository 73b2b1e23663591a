"""The batch that 07 measures: the pairs asked for, as text and as ids alike."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_study import DOMAIN, open_study

from allo_lib.data import miniature
from allo_lib.engine.encoding import encode_pairs
from allo_lib.errors import AlloError
from allo_lib.profiles.config import Timing
from allo_lib.study import workload


def words(count: int) -> str:
    return " ".join(["1"] * count)


@given(
    st.lists(st.tuples(*[st.integers(1, 12)] * 3), min_size=1, max_size=12),
    st.integers(0, 12),
    st.integers(1, 24),
    st.integers(1, 4),
)
def test_the_nearest_pairs_are_taken(lengths, prompt, responses, count):
    pairs = [
        {"prompt": words(p), "chosen": words(c), "rejected": words(r) + " 2"} for p, c, r in lengths
    ]
    timing = Timing(prompt=prompt, responses=responses, pairs=count)
    study = SimpleNamespace(
        profile=SimpleNamespace(timing=timing), tokenizer=miniature.tokenizer(), context=99
    )
    taken = workload._nearest(study, pairs)
    # An end token follows every response, and the rejected one has one word more.
    distance = [abs(p - prompt) + abs(c + r + 3 - responses) for p, c, r in lengths]
    assert len(taken) == min(count, len(pairs))
    found = [distance[next(i for i, p in enumerate(pairs) if p is one)] for one in taken]
    assert found == sorted(distance)[: len(taken)]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return open_study(tmp_path_factory.mktemp("workload"))


@pytest.mark.slow
def test_it_is_the_training_pairs_with_their_reference(study):
    load = workload.workload(study)
    expected = study.encoded(DOMAIN, "train")[: study.domain(DOMAIN).batch_size]
    assert [{k: row[k] for k in workload.COLUMNS} for row in load.rows] == [
        {k: row[k] for k in workload.COLUMNS} for row in expected
    ]
    for ours, theirs in zip(load.rows, expected, strict=True):
        assert ours["chosen_reference"] == pytest.approx(theirs["chosen_reference"], abs=1e-5)
    assert encode_pairs(study.tokenizer, load.texts, study.context) == [
        {k: row[k] for k in workload.COLUMNS} for row in load.rows
    ]
    assert load.tokens == sum(len(row[k]) for row in load.rows for k in workload.COLUMNS)


@pytest.mark.slow
def test_other_pairs_are_another_artifact(study):
    before = workload.workload(study).texts
    study.profile, plain = replace(study.profile, timing=Timing(prompt=9, pairs=2)), study.profile
    try:
        assert len(workload.workload(study).texts) == 2
    finally:
        study.profile = plain
    assert workload.workload(study).texts == before


def test_a_domain_that_is_not_there_is_told(tmp_path):
    with pytest.raises(AlloError, match="timing.domain: got 'nowhere', expected one of miniature"):
        open_study(tmp_path, timing__domain="nowhere")
    with pytest.raises(AlloError, match="greater than or equal to 1"):
        open_study(tmp_path, timing__steps=0)
