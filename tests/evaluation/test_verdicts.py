"""The rule of the verdicts: simulated studies get the right ones at the nominal rates."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allo_lib.evaluation.stats import mean_interval
from allo_lib.evaluation.verdicts import (
    CONTRADICTED,
    NEGLIGIBLE,
    NO_DIFFERENCE,
    OUTSIDE,
    SUPPORTED,
    UNDECIDED,
    Claim,
    corrected,
    decide,
    jointly,
    p_values,
)

# A study as it is designed: independent SFT models, replicates of each, problems of each model.
MODELS, REPLICATES, PROBLEMS = 8, 4, 2000
STUDIES = 700
# Planted effects in points, and run noise as measured: the standard deviation of a model's
# effect, and of one more run from the same model.
EFFECTS = (0.0, 0.0, 0.0, 0.5, -0.5, 2.0, -2.0, 1.0, 0.0)
BETWEEN = (1.5, 2.5, 4.0, 1.5, 0.5, 1.5, 1.5, 0.2, 0.2)
RUNS = (1.5, 2.0, 4.0, 1.5, 0.5, 1.5, 1.5, 0.2, 0.2)
APART = 0.10  # share of problems that tell two methods apart


def planted(rng, effects, between, runs, studies=STUDIES):
    """Effects and their standard errors over problems, [study, claim, model]."""
    shape = (studies, len(effects), MODELS)
    true = np.array(effects)[:, None] + rng.normal(size=shape) * np.array(between)[:, None]
    of_runs = rng.normal(size=(*shape, REPLICATES)) * np.array(runs)[:, None, None]
    share = (true[..., None] + of_runs) / 100
    apart = np.maximum(APART, np.abs(share))
    told = rng.binomial(PROBLEMS, apart)  # problems that only one of the two gets right
    gain = rng.binomial(told, (1 + share / apart) / 2)
    found = (2 * gain - told) / PROBLEMS
    errors = np.sqrt((told / PROBLEMS - found**2) / PROBLEMS)
    return found.mean(-1), np.sqrt((errors**2).mean(-1) / REPLICATES)


def study(effects, errors):
    """The claims of one study, corrected, with their intervals."""
    intervals = [
        mean_interval(dict(enumerate(own)), dict(enumerate(error)))
        for own, error in zip(effects.tolist(), errors.tolist(), strict=True)
    ]
    claims = [
        Claim(f"C{place}", "", found.effect, found.low, found.high, "accuracy", UNDECIDED, "",
              p_values(found, "accuracy"))
        for place, found in enumerate(intervals, 20)
    ]  # fmt: skip
    return intervals, corrected(claims)


@pytest.fixture(scope="module")
def studies():
    made = zip(*planted(np.random.default_rng(0), EFFECTS, BETWEEN, RUNS), strict=True)
    return [study(*one) for one in made]


def shares(studies, verdict):
    """The share of studies with this verdict, by claim."""
    return np.mean([[one.verdict == verdict for one in claims] for _, claims in studies], axis=0)


def test_intervals_cover_the_planted_effects(studies):
    true = np.array(EFFECTS) / 100
    ends = np.array([[(one.low, one.high) for one in intervals] for intervals, _ in studies])
    covered = ((ends[..., 0] <= true) & (true <= ends[..., 1])).mean(axis=0)
    assert 0.93 <= covered.min() and covered.max() <= 0.97  # of every claim
    assert covered.mean() == pytest.approx(0.95, abs=0.01)


def test_wrong_verdicts_are_rare_in_a_whole_study(studies):
    """Of nine claims not even one is wrong in 95% of the studies, of sign and of size."""
    true = np.array(EFFECTS)
    signs = [
        any(
            (one.verdict == SUPPORTED and effect <= 0)
            or (one.verdict == CONTRADICTED and effect >= 0)
            for one, effect in zip(claims, true, strict=True)
        )
        for _, claims in studies
    ]
    assert np.mean(signs) <= 0.05
    small = shares(studies, NO_DIFFERENCE)
    assert small[np.abs(true) >= 1].max() <= 0.05
    assert small[-1] > 0.95  # where there is none and runs agree to a fifth of a point


def test_verdicts_of_one_claim_are_right_at_the_nominal_rates():
    """Without a family: at no effect 5% have a sign, at a point 5% no difference; 2 are seen."""
    effects, between, runs = (0.0, 1.0, 2.0, -2.0), (1.5, 0.3, 1.5, 1.5), (1.5, 0.3, 1.5, 1.5)
    made = zip(*planted(np.random.default_rng(1), effects, between, runs, 1500), strict=True)
    found = []
    for own, errors in made:
        _, claims = study(own, errors)
        found.append([decide(one.p, one.p.sign, one.p.small) for one in claims])
    rates = {word: np.mean(np.array(found) == word, axis=0)
             for word in (SUPPORTED, CONTRADICTED, NO_DIFFERENCE)}  # fmt: skip
    assert 0.035 <= rates[SUPPORTED][0] + rates[CONTRADICTED][0] <= 0.065
    assert rates[NO_DIFFERENCE][1] <= 0.05  # most have a sure sign, which goes first
    assert rates[NO_DIFFERENCE][2:].max() <= 0.01
    assert rates[SUPPORTED][2] > 0.8 and rates[CONTRADICTED][3] > 0.8
    assert max(rates[CONTRADICTED][2], rates[SUPPORTED][3]) < 0.005


def of(effect, spread=0.01, count=5, unit="accuracy", bar=0.0):
    """The p-values of a mean over `count` models with this standard deviation."""
    steps = np.linspace(-1, 1, count)
    values = effect + spread * steps / steps.std(ddof=1)
    return p_values(mean_interval(dict(enumerate(values.tolist()))), unit, bar)


def word(p):
    return decide(p, p.sign, p.small)


@pytest.mark.parametrize(
    ("effect", "spread", "verdict", "options"),
    [
        (0.03, 0.02, SUPPORTED, {}),
        (-0.03, 0.02, CONTRADICTED, {}),
        (0.02, 0.02, UNDECIDED, {}),
        (0.0, 0.009, NO_DIFFERENCE, {}),  # 90% interval: half width 0.95 of the SD
        (0.0, 0.012, UNDECIDED, {}),
        (0.005, 0.003, SUPPORTED, {}),  # both: the sign goes first
        (-0.015, 0.003, SUPPORTED, {"bar": -0.02}),  # "no worse" has its margin as the bar
        (-0.025, 0.003, CONTRADICTED, {"bar": -0.02}),
        (-0.019, 0.01, UNDECIDED, {"bar": -0.02}),
        (0.0, 0.0001, UNDECIDED, {"unit": "training loss (reduction)"}),  # has no margin
    ],
)
def test_the_rule(effect, spread, verdict, options):
    assert word(of(effect, spread, **options)) == verdict


def test_one_model_and_equal_models_without_an_error_decide_nothing():
    assert p_values(None, "accuracy") is None
    some = mean_interval({0: 0.5, 1: 0.51, 2: 0.52})
    assert p_values(some, "accuracy", models=3) and p_values(some, "accuracy", models=4) is None
    assert p_values(mean_interval({0: 0.5}, {0: 0.001}), "accuracy") is None
    assert p_values(mean_interval({0: 0.5, 1: 0.5}), "accuracy") is None


@given(st.floats(-0.1, 0.1), st.floats(1e-4, 0.05), st.floats(0, 0.1), st.integers(2, 12))
def test_a_larger_effect_has_no_lower_verdict_and_the_opposite_claim_the_opposite_one(
    effect, spread, more, count
):
    order = {CONTRADICTED: 0, UNDECIDED: 1, NO_DIFFERENCE: 1, SUPPORTED: 2}
    first, second = of(effect, spread, count), of(effect + more, spread, count)
    assert order[word(first)] <= order[word(second)]
    opposite = {SUPPORTED: CONTRADICTED, CONTRADICTED: SUPPORTED}
    assert word(of(-effect, spread, count)) == opposite.get(word(first), word(first))


def test_a_claim_of_several_parts_is_about_the_smallest_effect():
    good, bad, none = of(0.05), of(-0.02, 0.015), of(0.0, 0.004)
    assert word(good) == SUPPORTED and word(bad) == CONTRADICTED
    # All must hold: the largest p of the parts, uncorrected.
    both = jointly([good, of(0.03)])
    assert both.above == max(good.above, of(0.03).above) and word(both) == SUPPORTED
    # One that fails is enough, at a price: k times its p.
    failed = jointly([good, good, bad])
    assert failed.below == 3 * bad.below and word(failed) == UNDECIDED
    assert word(jointly([good, of(-0.05)])) == CONTRADICTED
    # The smallest effect is within a point where one is, and none is below.
    assert word(jointly([good, none])) == NO_DIFFERENCE
    assert word(jointly([none, of(-0.005, 0.02)])) == UNDECIDED
    # A part that was not measured supports nothing, and hides no refutation.
    assert word(jointly([good, None])) == UNDECIDED
    assert word(jointly([of(-0.05), None])) == CONTRADICTED
    assert jointly([None, None]) is None


def claim(name, p, paper=None, unit="accuracy"):
    return Claim(name, "", 0.0, -0.01, 0.01, unit, UNDECIDED, "told", p, paper)


def test_a_supported_claim_has_supported_parts_and_others_pay_for_all_of_them():
    weak = of(0.0125, 0.01)  # p a little below 5%: twice that is above
    assert 0.025 < weak.sign < 0.05
    found = {one.id: one for one in corrected(
        [claim("C2", jointly([weak, weak])), claim("C2.a", weak), claim("C2.b", weak)]
    )}  # fmt: skip
    assert {one.verdict for one in found.values()} == {SUPPORTED}
    lost = of(-0.02, 0.02)
    found = corrected(
        [claim("C2", jointly([weak, lost])), claim("C2.a", weak), claim("C2.b", lost)]
    )
    assert {one.verdict for one in found} == {UNDECIDED}
    assert found[1].sign == pytest.approx(2 * weak.sign)


def test_tags_say_what_the_verdict_does_not():
    small, *_ = corrected([claim("C4s", of(0.005, 0.002), paper=0.02)])
    assert small.verdict == SUPPORTED and small.tags == (NEGLIGIBLE, OUTSIDE)
    assert small.evidence == f"{NEGLIGIBLE}; {OUTSIDE}; told"
    (sure,) = corrected([claim("C4s", of(0.05, 0.002))])
    assert sure.tags == ()
