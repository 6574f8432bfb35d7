"""significance.py against enumeration, SciPy, and its own promise under the null hypothesis."""

import itertools

import numpy as np
import pytest

from embedft.retrieval import significance
from embedft.retrieval.significance import holm, paired_bootstrap_interval, sign_flip_p_value


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
    low, high = paired_bootstrap_interval(skewed, generator=generator(), num_samples=20_000, confidence=0.9)
    interval = stats.bootstrap(
        (skewed,), np.mean, n_resamples=20_000, confidence_level=0.9, method="percentile", rng=generator(2)
    ).confidence_interval
    standard_error = skewed.std() / np.sqrt(60)
    assert (low, high) == pytest.approx((interval.low, interval.high), abs=0.06 * standard_error)


def test_clustered_interval_by_hand():
    # Clusters: one question with difference 1, three with 0. Two draws: (1+1)/2 = 1 with chance 1/4, (1+0)/(1+3) = 1/4
    # with 1/2, 0 with 1/4. So the quantiles 0.1 and 0.9 are 0 and 1, those at 0.3 and 0.7 both 1/4.
    differences, clusters = np.array([1.0, 0.0, 0.0, 0.0]), ["a", "b", "b", "b"]
    assert paired_bootstrap_interval(differences, clusters, generator=generator(), confidence=0.8) == (0.0, 1.0)
    assert paired_bootstrap_interval(differences, clusters, generator=generator(), confidence=0.4) == (0.25, 0.25)


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
    rejected = {"clusters": 0, "naive": 0, "interval": 0}
    for _ in range(trials):
        differences = np.repeat(rng.standard_normal(30), 4)
        rejected["clusters"] += sign_flip_p_value(differences, clusters, generator=rng, num_samples=499) <= 0.05
        rejected["naive"] += sign_flip_p_value(differences, generator=rng, num_samples=499) <= 0.05
        low, high = paired_bootstrap_interval(differences, clusters, generator=rng, num_samples=499)
        rejected["interval"] += not low <= 0 <= high
    monte_carlo = 3 * np.sqrt(0.05 * 0.95 / trials)
    assert 0.02 < rejected["clusters"] / trials <= 0.05 + monte_carlo
    assert rejected["naive"] / trials > 0.25
    assert rejected["interval"] / trials <= 0.09 + monte_carlo  # percentile intervals of 30 clusters are a bit narrow


def test_blocks_cover_all_samples(monkeypatch):
    differences = generator(2).standard_normal(40)
    whole = sign_flip_p_value(differences, generator=generator(), num_samples=1001)
    interval = paired_bootstrap_interval(differences, generator=generator(), num_samples=1001)
    monkeypatch.setattr(significance, "BLOCK_VALUES", 50)
    assert sign_flip_p_value(differences, generator=generator(), num_samples=1001) == pytest.approx(whole, abs=0.08)
    assert paired_bootstrap_interval(differences, generator=generator(), num_samples=1001) == pytest.approx(
        interval, abs=0.1
    )
    assert list(significance._blocks(1001, 20)) == [2] * 500 + [1]
    assert list(significance._blocks(3, 51)) == [1, 1, 1]


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
    ("differences", "clusters", "options", "message"),
    [
        (np.array([]), None, {}, "differences must be"),
        (np.array([0.1, np.nan]), None, {}, "differences must be"),
        (np.ones((2, 2)), None, {}, r"shape \(2, 2\)"),
        (np.ones(3), ["a", "b"], {}, "2 cluster ids for 3 questions"),
        (np.ones(3), None, {"num_samples": 0}, "num_samples must be at least 1"),
    ],
)
def test_bad_input(differences, clusters, options, message):
    for function in (sign_flip_p_value, paired_bootstrap_interval):
        with pytest.raises(ValueError, match=message):
            function(differences, clusters, generator=generator(), **options)
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1, not 95"):
        paired_bootstrap_interval(np.ones(3), generator=generator(), confidence=95)
