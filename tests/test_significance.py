"""significance.py against enumeration, SciPy, and its nominal error rate under the null hypothesis."""

import itertools
import math

import numpy as np
import pytest
from naming import naming

from embedft.retrieval import significance
from embedft.retrieval.significance import (
    _t_p_value,
    holm,
    paired_bootstrap_interval,
    recipe_interval,
    sign_flip_p_value,
    t_quantile,
)


def generator(seed=0):
    return np.random.default_rng(seed)


def exact_p_value(cluster_sums):
    """All sign assignments of the clusters."""
    totals = [abs(np.dot(signs, cluster_sums)) for signs in itertools.product((-1, 1), repeat=len(cluster_sums))]
    return np.mean(np.array(totals) >= abs(sum(cluster_sums)) - 1e-9)


def test_no_difference():
    zeros = np.zeros(50)
    assert paired_bootstrap_interval(zeros, generator=generator()) == (0.0, 0.0)
    assert sign_flip_p_value(zeros, generator=generator(), num_samples=999) == 1.0


def test_p_value_by_hand():
    # Three questions, all better by 1: of the 8 sign patterns +++ and --- reach the observed |mean|, so p = 2/8.
    p_value = sign_flip_p_value(np.ones(3), generator=generator(), num_samples=20_000)
    assert p_value == pytest.approx(2 / 8, abs=5 * np.sqrt(0.25 * 0.75 / 20_000))
    # As one cluster the two patterns are all there are.
    assert sign_flip_p_value(np.ones(3), ["c"] * 3, generator=generator(), num_samples=100) == 1.0
    # Never 0: with 20 questions a hit among 99 samples has a chance of 99 in 2^19.
    assert sign_flip_p_value(np.ones(20), generator=generator(), num_samples=99) == 1 / 100


def test_p_value_with_clusters_equals_enumeration():
    # Steps of a tenth: many totals tie exactly with the observed one and must count as hits despite rounding.
    rng = generator(3)
    differences = rng.integers(-2, 5, size=20) / 10
    clusters = [f"c{i}" for i in rng.integers(0, 9, size=20)]
    sums = [differences[[c == name for c in clusters]].sum() for name in sorted(set(clusters))]
    exact = exact_p_value(sums)
    assert 0.02 < exact < 0.98
    p_value = sign_flip_p_value(differences, clusters, generator=generator(), num_samples=40_000)
    assert p_value == pytest.approx(exact, abs=5 * np.sqrt(exact * (1 - exact) / 40_000))


def test_ties_count_despite_rounding():
    # In tenths the total is -1 and every other choice of signs gives an odd number too, so all are hits. In float64
    # some of them come out just below.
    differences = np.array([-0.2, -0.1, 0.3, -0.1])
    assert sign_flip_p_value(differences, generator=generator(), num_samples=999) == 1.0


def test_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = generator(5)
    base, other = rng.random(60), rng.random(60)
    other += 0.07
    ours = sign_flip_p_value(other - base, generator=generator(), num_samples=20_000)
    theirs = stats.permutation_test(
        (other, base), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=20_000, rng=generator(1)
    ).pvalue
    assert 0.01 < theirs < 0.5
    assert ours == pytest.approx(theirs, abs=5 * np.sqrt(2 * theirs * (1 - theirs) / 20_000))

    skewed = rng.exponential(size=60) - 0.8
    low, high = paired_bootstrap_interval(skewed, generator=generator(), num_samples=20_000)
    interval = stats.bootstrap(
        (skewed,), np.mean, n_resamples=20_000, method="percentile", rng=generator(2)
    ).confidence_interval
    standard_error = skewed.std() / np.sqrt(60)
    assert (low, high) == pytest.approx((interval.low, interval.high), abs=0.06 * standard_error)


def test_equals_ranx():
    """Fisher's randomisation test, within four standard errors of 5,000 permutations."""
    tests = pytest.importorskip("ranx.statistical_tests")
    rng = generator(4)
    base = rng.choice([0, 1 / 3, 1 / 2, 1], 60)
    for shift in (0.0, 0.06, 0.12):
        other = base + rng.normal(shift, 0.2, 60)
        p_value, _ = tests.fisher_randomization_test(base, other, n_permutations=5_000, random_seed=1)
        ours = sign_flip_p_value(other - base, list(range(60)), generator=generator(), num_samples=20_000)
        assert abs(ours - p_value) < 4 * math.sqrt(p_value * (1 - p_value) * (1 / 5_000 + 1 / 20_000)) + 1e-3


# A recipe.


def test_t_distribution_by_hand():
    # One degree of freedom is Cauchy's distribution: P(|T| >= 1) = 1/2. Two: P(|T| >= t) = 1 - t / sqrt(t^2 + 2).
    assert _t_p_value(1, 1) == pytest.approx(0.5, abs=1e-13)
    assert _t_p_value(-2, 2) == pytest.approx(1 - 2 / math.sqrt(6), abs=1e-13)
    assert (_t_p_value(0, 3), _t_p_value(math.inf, 3)) == (1.0, pytest.approx(0.0, abs=1e-12))
    assert t_quantile(0.5, 1) == pytest.approx(1, abs=1e-12)
    assert t_quantile(0.95, 2) == pytest.approx(math.sqrt(2 * 0.95**2 / (1 - 0.95**2)), abs=1e-10)  # 4.3027


def test_t_distribution_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    for degrees in (1, 1.02, 2, 2.5, 5, 29, 59.9, 999, 1e6):
        for t in (1e-12, 1e-3, 0.5, 1, 1.7, 3, 8, 100):
            assert _t_p_value(t, degrees) == pytest.approx(2 * stats.t.sf(t, degrees), abs=2e-9)
        for confidence in (0.1, 0.95, 0.99):
            expected = stats.t.ppf((1 + confidence) / 2, degrees)
            assert t_quantile(confidence, degrees) == pytest.approx(expected, rel=1e-7)


def test_recipe_by_hand():
    # Seeds' means 1 and 3, m = 2: V_S = (1 + 1) / (2 * 1) = 1. Questions' means 1 and 3: V_C = 2/1 * 2 / 4 = 1.
    # 0, 2 and 2, 4 have no noise left: V = 2. Degrees 2^2 / (1/1 + 1/1) = 2, t = 4.302653.
    found = recipe_interval(np.array([[0.0, 2.0], [2.0, 4.0]]))
    assert (found["seed_error"], found["question_error"]) == (1.0, 1.0)
    reach = 4.302653 * math.sqrt(2)
    assert found["interval"] == pytest.approx((2 - reach, 2 + reach), abs=1e-5)
    assert found["p_value"] == pytest.approx(1 - math.sqrt(2) / 2)  # t = sqrt(2): 1 - t / sqrt(t^2 + 2)


def test_the_noise_of_a_question_under_a_seed_counts_once():
    # Seeds' means 2 and 2: V_S = 0. Questions' means 1 and 3: V_C = 1. Noise -1 1 / 1 -1: V_SC = 4/1 * 4 / 16 = 1.
    # V is not below V_C: max(1 - min(1, 0), 0) = 1.
    # With C - 1 = 1 degree of freedom t is 12.7062.
    found = recipe_interval(np.array([[0.0, 4.0], [2.0, 2.0]]))
    assert (found["seed_error"], found["question_error"]) == (0.0, 1.0)
    assert found["interval"] == pytest.approx((2 - 12.7062, 2 + 12.7062), abs=1e-4)
    # Pure noise, many cells: V_S, V_C and V_SC all estimate the same variance, and V is about it, not twice it. With 19
    # to 38 degrees of freedom t is 2.02 to 2.09.
    intervals = [recipe_interval(generator(i).standard_normal((20, 20)))["interval"] for i in range(100)]
    assert np.mean([((high - low) / 2 / 2.06) ** 2 for low, high in intervals]) == pytest.approx(1 / 400, rel=0.3)


def test_recipe_with_clusters():
    rng = generator(2)
    differences = rng.standard_normal((3, 10)) + rng.standard_normal((3, 1))
    plain = recipe_interval(differences)
    doubled = recipe_interval(np.tile(differences, 2), [f"c{i}" for i in range(10)] * 2)
    for name, value in plain.items():
        assert doubled[name] == pytest.approx(value), name
    assert recipe_interval(np.tile(differences, 2))["question_error"] < 0.8 * plain["question_error"]
    # Clusters a (0, 1) and b (5), the same under both seeds: mean 2, sums less size times mean -3 and 3, so V_C is
    # 2/1 * 18 / 9 = 4.
    found = recipe_interval(np.array([[0.0, 1.0, 5.0]] * 2), ["a", "a", "b"])
    assert (found["question_error"], found["seed_error"]) == pytest.approx((2.0, 0.0))
    assert found["interval"] == pytest.approx((2 - 2 * 12.7062, 2 + 2 * 12.7062), abs=1e-3)


def test_recipe_without_spread_and_refused():
    found = recipe_interval(np.zeros((3, 5)))
    assert (found["interval"], found["p_value"]) == ((0.0, 0.0), 1.0)
    for wrong in (np.ones(5), np.ones((1, 5))):
        with pytest.raises(ValueError, match=naming("differences", wrong.shape, 2, "seeds")):
            recipe_interval(wrong)
    with pytest.raises(ValueError, match=naming("cluster", 1, 2)):
        recipe_interval(np.ones((3, 5)), ["c"] * 5)


@pytest.mark.parametrize(("by_seed", "by_document", "noise"), [(0.1, 0.3, 0.3), (0.1, 0.0, 0.1), (0.0, 0.3, 0.3)])
def test_recipe_covers_what_it_says(by_seed, by_document, noise):
    # Three seeds, 30 documents with two questions; 300 trials.
    rng, hits, narrow = generator(13), 0, 0
    clusters = np.repeat(np.arange(30), 2).astype(str)
    for _ in range(300):
        documents = np.repeat(by_document * rng.standard_normal((1, 30)), 2, axis=1)
        found = recipe_interval(
            by_seed * rng.standard_normal((3, 1)) + documents + noise * rng.standard_normal((3, 60)), clusters
        )
        low, high = found["interval"]
        hits += low <= 0 <= high
        narrow += abs(low + high) / 2 <= 1.96 * found["question_error"]
    assert 0.95 - 3 * math.sqrt(0.05 * 0.95 / 300) <= hits / 300
    if by_seed:
        assert narrow / 300 < 0.87  # questions alone promise too much


def test_clustered_interval_by_hand():
    # Clusters: one question with difference 1, three with 0. Two draws: (1+1)/2 = 1 with chance 1/4, (1+0)/(1+3) = 1/4
    # with 1/2, 0 with 1/4. So the quantiles 0.025 and 0.975 are 0 and 1.
    differences, clusters = np.array([1.0, 0.0, 0.0, 0.0]), ["a", "b", "b", "b"]
    assert paired_bootstrap_interval(differences, clusters, generator=generator()) == (0.0, 1.0)
    # A cluster of three questions with difference 1 and 79 of one question with 0 each: 0, 1, 2, ... times in 80 draws
    # with chances of 0.3656, 0.3702, 0.1851, 0.0609, 0.0148, ... so the quantile 0.975 is at 3 times,
    # 3 * 3 / (3 * 3 + 77).
    differences, clusters = np.array([1.0] * 3 + [0.0] * 79), ["c"] * 3 + [f"d{i}" for i in range(79)]
    low, high = paired_bootstrap_interval(differences, clusters, generator=generator())
    assert (low, high) == (0.0, pytest.approx(9 / 86))


def test_clusters_of_one_question_change_nothing_and_doubled_questions_no_interval():
    differences = generator(1).standard_normal(30)
    names = [f"c{i:02d}" for i in range(30)]
    plain = paired_bootstrap_interval(differences, generator=generator(9))
    assert paired_bootstrap_interval(differences, names, generator=generator(9)) == plain
    doubled = paired_bootstrap_interval(np.tile(differences, 2), names * 2, generator=generator(9))
    assert doubled == pytest.approx(plain, abs=1e-12)
    low, high = paired_bootstrap_interval(np.tile(differences, 2), generator=generator(9))
    assert high - low < 0.8 * (plain[1] - plain[0])  # the naive interval is narrower by about sqrt(2)


def test_under_the_null_clusters_keep_the_error_rate_and_the_naive_test_does_not():
    # 30 documents with 4 questions each, which always agree; no system is better. 400 trials.
    rng, trials = generator(7), 400
    clusters = [f"c{i // 4}" for i in range(120)]
    rejected = dict.fromkeys(("clusters", "naive", "percentile"), 0)
    for _ in range(trials):
        differences = np.repeat(rng.standard_normal(30), 4)
        options = {"generator": rng, "num_samples": 299}
        rejected["clusters"] += sign_flip_p_value(differences, clusters, **options) <= 0.05
        rejected["naive"] += sign_flip_p_value(differences, **options) <= 0.05
        low, high = paired_bootstrap_interval(differences, clusters, **options)
        rejected["percentile"] += not low <= 0 <= high
    monte_carlo = 3 * np.sqrt(0.05 * 0.95 / trials)
    assert 0.02 < rejected["clusters"] / trials <= 0.05 + monte_carlo
    assert rejected["naive"] / trials > 0.25
    assert rejected["percentile"] / trials <= 0.09 + monte_carlo  # a bit narrow with 30 clusters


def test_blocks_cover_all_samples():
    # Three blocks of at most 349: without a difference every one of the samples is a hit.
    assert sign_flip_p_value(np.zeros(3000), generator=generator(), num_samples=1001) == 1.0
    assert list(significance._blocks(1001, 20, 50)) == [2] * 500 + [1]
    assert list(significance._blocks(3, 51, 50)) == [1, 1, 1]


def test_same_seed_same_bits():
    differences = generator(2).standard_normal(40)
    for function in (sign_flip_p_value, paired_bootstrap_interval):
        assert function(differences, generator=generator(4)) == function(differences, generator=generator(4))


def test_holm_by_hand():
    # Sorted: 0.01 * 4 = 0.04, 0.02 * 3 = 0.06, 0.03 * 2 = 0.06, 0.5 * 1 = 0.5
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    # 0.04 * 2 = 0.08, then 0.05 * 1 = 0.05 may not fall below it; 0.9 * 2 is cut to 1
    assert holm([0.05, 0.04]) == pytest.approx([0.08, 0.08])
    assert holm([0.9, 0.9]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]


@pytest.mark.parametrize(
    ("differences", "clusters", "options", "facts"),
    [
        (np.array([]), None, {}, ("differences", (0,), "finite")),
        (np.array([0.1, np.nan]), None, {}, ("differences", (2,), "finite")),
        (np.ones((2, 2)), None, {}, ("differences", (2, 2), "finite")),
        (np.ones(3), None, {"num_samples": 0}, ("num_samples", 0, 1)),
    ],
)
def test_bad_input(differences, clusters, options, facts):
    for function in (sign_flip_p_value, paired_bootstrap_interval):
        with pytest.raises(ValueError, match=naming(*facts)):
            function(differences, clusters, generator=generator(), **options)
