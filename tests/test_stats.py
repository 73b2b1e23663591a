"""Intervals: against independent formulas, and their coverage on simulated data."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from allo_lib import stats
from allo_lib.errors import AlloError
from allo_lib.stats import PairedCounts


def test_one_model_has_an_interval_over_its_problems_and_decides_nothing():
    rng = np.random.default_rng(0)
    ours, theirs = rng.random(400) < 0.7, rng.random(400) < 0.6
    counts = PairedCounts(float(np.mean(ours & ~theirs)), float(np.mean(theirs & ~ours)), 400)
    found = stats.paired_interval({0: {"chain": counts}})
    differences = ours.astype(float) - theirs.astype(float)
    error = float(scipy_stats.sem(differences))
    assert found.effect == pytest.approx(differences.mean())
    assert found.stderr == pytest.approx(error, rel=0.01)
    assert found.high - found.effect == pytest.approx(1.959964 * found.stderr)
    assert found.kind == "over problems alone, one SFT model" and not found.decides


def test_data_sets_count_equally_whatever_their_size():
    cells = {0: {"small": PairedCounts(0.5, 0.0, 10), "large": PairedCounts(0.0, 0.1, 5000)}}
    found = stats.paired_interval(cells)
    assert found.effect == pytest.approx(0.2)
    assert found.n == 5010


def test_several_models_have_students_t_over_their_effects():
    effects = (0.06, 0.02, -0.05)
    cells = {i: {"chain": PairedCounts(0.1 + e, 0.1, 2000)} for i, e in enumerate(effects)}
    found = stats.paired_interval(dict(reversed(cells.items())))
    assert found.seeds == (0, 1, 2) and found.by_seed == pytest.approx(effects)
    expected = scipy_stats.ttest_1samp(effects, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.kind == "t interval over 3 SFT models" and found.decides


def test_models_that_agree_are_known_no_better_than_by_their_problems():
    """Two equal effects: no interval of no width, but the one that 4,000 problems would give."""
    cell = PairedCounts(0.15, 0.10, 2000)
    found = stats.paired_interval({0: {"chain": cell}, 1: {"chain": cell}})
    error = math.sqrt((0.25 - 0.05**2) / 4000)
    assert found.high - found.effect == pytest.approx(1.959964 * error, rel=0.01)
    assert found.p_above(0.0) > 0 and "less than their problems" in found.kind
    # Nothing tells how precise two equal numbers without problems are.
    bare = stats.mean_interval({0: 0.03, 1: 0.03})
    assert not bare.defined and not bare.decides and math.isnan(bare.low)


def test_the_same_input_gives_the_same_interval():
    cells = {0: {"chain": PairedCounts(0.2, 0.1, 500)}}
    assert stats.paired_interval(cells) == stats.paired_interval(cells)


def test_no_difference_seen_is_not_a_difference_of_zero():
    """Not one of 500 problems tells them apart: up to 3 in 500 might (the rule of three)."""
    found = stats.paired_interval({0: {"chain": PairedCounts(0.0, 0.0, 500)}})
    assert found.effect == 0.0 and found.low < 0 < found.high
    assert 1 / 500 <= found.high <= 6 / 500 and -6 / 500 <= found.low <= -1 / 500


def test_intervals_cover_where_few_problems_tell_methods_apart():
    rng, hits = np.random.default_rng(0), 0
    gain, loss, n = 0.002, 0.006, 400
    for counts in rng.multinomial(n, [gain, loss, 1 - gain - loss], size=300):
        cell = PairedCounts(counts[0] / n, counts[1] / n, n)
        found = stats.paired_interval({0: {"chain": cell}})
        hits += found.low <= gain - loss <= found.high
    assert 0.94 <= hits / 300


@given(
    st.integers(1, 2000).flatmap(
        lambda n: st.tuples(st.just(n), st.integers(0, n)).flatmap(
            lambda pair: st.tuples(
                st.just(pair[0]), st.just(pair[1]), st.integers(0, pair[0] - pair[1])
            )
        )
    )
)
def test_any_counts_give_an_interval_inside_the_possible(counts):
    n, gain, loss = counts
    # Ten digits, as the text file has them.
    cell = PairedCounts(float(f"{gain / n:.10g}"), float(f"{loss / n:.10g}"), n)
    found = stats.paired_interval({0: {"chain": cell}})
    assert -1 <= found.low <= found.high <= 1
    assert found.effect == pytest.approx((gain - loss) / n, abs=1e-9)


@pytest.mark.parametrize("bad", [(0.6, 0.6, 10), (-0.1, 0.0, 10), (0.1, 0.1, 0)])
def test_impossible_counts_are_refused(bad):
    with pytest.raises(AlloError, match="expected shares"):
        PairedCounts(*bad)


def test_seeds_with_other_data_sets_are_refused():
    cell = PairedCounts(0.1, 0.1, 10)
    with pytest.raises(AlloError, match="different data sets in different seeds"):
        stats.paired_interval({0: {"chain": cell}, 1: {"scan": cell}})
    with pytest.raises(AlloError, match="no paired counts"):
        stats.paired_interval({})


def test_mean_over_seeds_is_students_t():
    values = {0: 0.5, 1: 0.56, 2: 0.53}
    found = stats.mean_interval(values)
    low, high = scipy_stats.t.interval(
        0.95, 2, loc=0.53, scale=scipy_stats.sem(list(values.values()))
    )
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.seed_sd == pytest.approx(0.03) and found.stderr == pytest.approx(0.03 / 3**0.5)
    assert found.kind == "t interval over 3 SFT models"


def test_one_seed_uses_its_standard_error_or_nothing():
    found = stats.mean_interval({4: 0.5}, {4: 0.01})
    assert (found.low, found.high) == pytest.approx((0.5 - 0.0196, 0.5 + 0.0196), abs=1e-5)
    for stderrs in (None, {4: 0.0}):
        bare = stats.mean_interval({4: 0.5}, stderrs)
        assert not bare.defined and math.isnan(bare.low) and bare.effect == 0.5
    with pytest.raises(AlloError, match="no values"):
        stats.mean_interval({})


def test_concentration_of_a_single_bad_token():
    shares, held = stats.concentration([-9.0] + [-1.0] * 9 + [0.5] * 10, points=21)
    assert held[0] == 0 and held[-1] == pytest.approx(1)
    assert held[1] == pytest.approx(0.5)  # 1 of 20 tokens holds 9 of 18 nats
    assert held[10] == pytest.approx(1)  # and half of them hold all
    assert np.all(np.diff(held) >= -1e-12) and shares[1] == pytest.approx(0.05)


@pytest.mark.parametrize("bad", [[0.0, 1.0], [math.nan, -1.0]])
def test_concentration_needs_finite_and_some_negative(bad):
    with pytest.raises(AlloError, match="log-ratios must be finite"):
        stats.concentration(bad)


def test_an_interval_is_cut_to_where_its_quantity_can_lie():
    wide = stats.mean_interval({0: 0.99, 1: 0.99, 2: 0.5})
    assert wide.low < 0 or wide.high > 1
    cut = wide.within(0.0, 1.0)
    assert (cut.low, cut.high) == (max(0.0, wide.low), 1.0)
    assert (cut.effect, cut.stderr, cut.seeds) == (wide.effect, wide.stderr, wide.seeds)
    inside = stats.mean_interval({0: 0.5, 1: 0.51, 2: 0.52})
    assert inside.within(0.0, 1.0) == inside
    assert not stats.mean_interval({4: 0.5}).within(0.0, 1.0).defined


# --- seeds and correlated problems, whose effect is known --------------------------------------


def simulated(rng, simulations, seeds, effects=(0.03, 0.06, 0.09), n=300, between=0.02):
    """Shares (gain, loss, base), [simulation, seed, data set], of two methods on the same problems.

    The second method is right on 0.7 of them, the first on `effects` more, give or take `between`
    from seed to seed; a problem that is hard for one is hard for the other (correlation 0.6).
    """
    shape = (simulations, seeds, len(effects))
    shared = rng.normal(size=(*shape, n))
    ours, theirs = (0.6**0.5 * shared + 0.4**0.5 * rng.normal(size=(*shape, n)) for _ in "ab")
    more = np.asarray(effects) + rng.normal(0, between, size=(simulations, seeds, 1))
    right = ours < scipy_stats.norm.ppf(0.7 + more)[..., None]
    base = theirs < scipy_stats.norm.ppf(0.7)
    gain, loss = right & ~base, base & ~right
    return np.stack([gain.mean(-1), loss.mean(-1), base.mean(-1), right.mean(-1)], axis=-1)


def intervals(shares, n=300, relative=False, paired=True):
    """The interval of each simulation."""
    for table in shares:
        cells = {}
        for seed, row in enumerate(table):
            cells[seed] = {
                str(place): PairedCounts(gain, loss, n, base)
                if paired else PairedCounts.independent(ours, base, n)
                for place, (gain, loss, base, ours) in enumerate(row)
            }  # fmt: skip
        yield stats.paired_interval(cells, relative=relative)


@pytest.mark.parametrize(("seeds", "between"), [(1, 0.0), (2, 0.0), (3, 0.01), (5, 0.02)])
@pytest.mark.parametrize("relative", [False, True])
def test_intervals_cover_a_known_effect_of_correlated_problems(seeds, between, relative):
    shares = simulated(np.random.default_rng(4), 300, seeds, between=between)
    effect = 0.06 / 0.7 if relative else 0.06
    hits = [found.low <= effect <= found.high for found in intervals(shares, relative=relative)]
    assert 0.90 <= np.mean(hits)


def test_intervals_of_unpaired_accuracies_cover_more():
    """Methods that find the same problems hard differ less than independent ones would."""
    shares = simulated(np.random.default_rng(5), 200, seeds=5, between=0.01)
    hits = [found.low <= 0.06 <= found.high for found in intervals(shares, paired=False)]
    assert np.mean(hits) >= 0.97
    found = next(intervals(shares, paired=False))
    assert found.kind.endswith("accuracies taken as independent")


def test_p_values_are_those_of_the_t_test():
    values = (0.02, 0.05, 0.03, 0.06)
    found = stats.mean_interval(dict(enumerate(values)))
    for bar in (-0.01, 0.0, 0.02, 0.1):
        expected = scipy_stats.ttest_1samp(values, bar, alternative="greater").pvalue
        assert found.p_above(bar) == pytest.approx(expected)
        assert found.p_below(bar) == pytest.approx(1 - expected)
    assert found.p_above(found.low) == pytest.approx(0.025)
    low, high = found.ends(0.90)
    assert found.p_above(low) == pytest.approx(0.05) == found.p_below(high)
    normal = stats.mean_interval({0: 0.03}, {0: 0.01})
    assert normal.p_above(0.0) == pytest.approx(scipy_stats.norm.sf(3.0))


def test_relative_changes_of_one_model_match_a_bootstrap_over_listed_problems():
    rng = np.random.default_rng(8)
    hard = rng.random(500)
    ours, theirs = (0.7 * hard + 0.3 * rng.random(500) < share for share in (0.6, 0.5))
    counts = PairedCounts(
        float(np.mean(ours & ~theirs)), float(np.mean(theirs & ~ours)), 500, float(np.mean(theirs))
    )
    found = stats.paired_interval({0: {"chain": counts}}, relative=True)
    listed = scipy_stats.bootstrap(
        (ours.astype(float), theirs.astype(float)),
        lambda a, b, axis=-1: a.mean(axis=axis) / b.mean(axis=axis) - 1,
        paired=True, n_resamples=10_000, method="percentile", rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert found.effect == pytest.approx(ours.mean() / theirs.mean() - 1)
    assert found.low == pytest.approx(listed.low, abs=0.01)
    assert found.high == pytest.approx(listed.high, abs=0.01)


def test_relative_changes_need_something_to_be_relative_to():
    with pytest.raises(AlloError, match="expected the second method's accuracy"):
        stats.paired_interval({0: {"chain": PairedCounts(0.1, 0.1, 10)}}, relative=True)
    with pytest.raises(AlloError, match="gets nothing right"):
        stats.paired_interval({0: {"chain": PairedCounts(0.1, 0.0, 10, 0.0)}}, relative=True)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=5))
def test_a_minus_b_is_the_mirror_image_of_b_minus_a(counts):
    """Whatever the models, problems and ties: effect, interval and p-values, turned round."""
    one = {i: {"chain": PairedCounts(a / 200, b / 200, 200)} for i, (a, b) in enumerate(counts)}
    other = {i: {"chain": PairedCounts(b / 200, a / 200, 200)} for i, (a, b) in enumerate(counts)}
    ours, theirs = stats.paired_interval(one), stats.paired_interval(other)
    assert (ours.effect, ours.low) == pytest.approx((-theirs.effect, -theirs.high))
    assert ours.p_above(0.01) == pytest.approx(theirs.p_below(-0.01))
    assert ours.decides == (len(counts) > 1) and ours.low < ours.effect < ours.high


def test_a_difference_ends_where_accuracies_do():
    cells = {seed: {"a": PairedCounts(gain, 0, 1000, 0.1)} for seed, gain in enumerate((0, 0.9))}
    found = stats.paired_interval(cells)
    assert (found.low, found.high) == (-1, 1)
    assert stats.paired_interval(cells, relative=True).low == -1
