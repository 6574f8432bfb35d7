"""significance.py against enumeration, SciPy, and its own promise under the null hypothesis."""

import itertools
import math

import numpy as np
import pytest

from embedft.retrieval import significance
from embedft.retrieval.significance import (
    effect_size,
    holm,
    paired_bootstrap_interval,
    paired_t_test,
    questions_needed,
    recipe_interval,
    sign_flip_p_value,
    wins_ties_losses,
)
from embedft.retrieval.t_distribution import t_p_value, t_quantile


def generator(seed=0):
    return np.random.default_rng(seed)


def exact_p_value(cluster_sums):
    """All sign assignments of the clusters."""
    totals = [abs(np.dot(signs, cluster_sums)) for signs in itertools.product((-1, 1), repeat=len(cluster_sums))]
    return np.mean(np.array(totals) >= abs(sum(cluster_sums)) - 1e-9)


def test_no_difference():
    zeros = np.zeros(50)
    for method in ("percentile", "bca"):
        assert paired_bootstrap_interval(zeros, generator=generator(), method=method) == (0.0, 0.0)
    assert (paired_t_test(zeros).t, paired_t_test(zeros).p_value) == (0.0, 1.0)
    assert (effect_size(zeros), wins_ties_losses(zeros)) == (0.0, (0, 50, 0))
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


@pytest.mark.parametrize("mirror", [1, -1])
def test_bca_equals_scipy(mirror):
    stats = pytest.importorskip("scipy.stats")
    skewed = mirror * (generator(5).exponential(size=25) ** 2 - 0.8)
    options = {"num_samples": 40_000, "confidence": 0.9}
    ours = paired_bootstrap_interval(skewed, generator=generator(), method="bca", **options)
    theirs = stats.bootstrap(
        (skewed,), np.mean, n_resamples=40_000, confidence_level=0.9, method="BCa", rng=generator(2)
    ).confidence_interval
    standard_error = skewed.std() / 5
    percentile = paired_bootstrap_interval(skewed, generator=generator(), **options)
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.08 * standard_error)
    assert mirror * (sum(ours) - sum(percentile)) > 0.3 * standard_error  # moved to where the long tail is
    # Clusters of two equal questions: the same numbers as their means, jackknife and all.
    clusters = [f"c{i:02d}" for i in range(25)]
    doubled = paired_bootstrap_interval(
        np.tile(skewed, 2), clusters * 2, generator=generator(), method="bca", **options
    )
    assert doubled == pytest.approx(ours, abs=1e-9)


def test_bca_by_hand():
    # Clusters (sum, questions): a (1, 1) and b (0, 3), mean 1/4. Of two draws aa has 1, ab and ba 1/4, bb 0, so the
    # share below 1/4 is 1/4 + half of 1/2 = 1/2 and z0 = 0. Jackknife means: without a 0, without b 1; d = (1/2, -1/2)
    # and a = 0.
    # BCa is then the percentile interval.
    differences, clusters = np.array([1.0, 0.0, 0.0, 0.0]), ["a", "b", "b", "b"]
    for confidence, expected in ((0.8, (0.0, 1.0)), (0.4, (0.25, 0.25))):
        found = paired_bootstrap_interval(
            differences, clusters, generator=generator(), confidence=confidence, method="bca"
        )
        assert found == expected


def test_bca_shares_by_hand():
    # Four means, one below the observed 0: z0 = Phi^-1(1/4) = -0.67449. Jackknife means of (2, -1, -1): -1, 1/2, 1/2;
    # d = (1, -1/2, -1/2), sum d^3 = 3/4, sum d^2 = 3/2, a = 0.75 / (6 * 1.5^1.5) = 0.068041. At z = 1 (share 0.841345):
    # z0 + z = 0.32551, / (1 - 0.068041 * 0.32551) = 0.33289, and Phi(-0.67449 + 0.33289) = 0.36633.
    shares = significance._bca_shares(
        np.array([0.8413447460685429]), np.array([-1.0, 1.0, 2.0, 3.0]), np.array([2.0, -1.0, -1.0]), np.ones(3)
    )
    assert shares == pytest.approx([0.36633], abs=2e-5)


def test_bca_at_its_edges():
    # A constant has no spread, one cluster is a point.
    assert paired_bootstrap_interval(np.full(5, 0.1), generator=generator(), method="bca") == pytest.approx((0.1, 0.1))
    assert paired_bootstrap_interval(np.array([1.0, 0.0]), ["c", "c"], generator=generator(), method="bca") == (
        0.5,
        0.5,
    )
    # All samples above the mean, and a share so far out that BCa's divisor falls below 0: the last sample.
    ends = significance._bca_shares(
        np.array([1e-9, 1 - 1e-15]), np.linspace(1, 2, 10**6), np.array([30.0] + [0.0] * 29), np.ones(30)
    )
    assert ends[0] < 1e-9
    assert 0 <= ends[1] <= 1
    with pytest.raises(ValueError, match="unknown method 'basic'; valid: percentile, bca"):
        paired_bootstrap_interval(np.ones(3), generator=generator(), method="basic")


# Student's t.


def test_t_distribution_by_hand():
    # One degree of freedom is Cauchy's distribution: P(|T| >= 1) = 1/2. Two: P(|T| >= t) = 1 - t / sqrt(t^2 + 2).
    assert t_p_value(1, 1) == pytest.approx(0.5, abs=1e-14)
    assert t_p_value(-2, 2) == pytest.approx(1 - 2 / math.sqrt(6), abs=1e-14)
    assert (t_p_value(0, 3), t_p_value(math.inf, 3), t_p_value(-math.inf, 3)) == (1.0, 0.0, 0.0)
    assert t_quantile(0.5, 1) == pytest.approx(1, abs=1e-13)
    assert t_quantile(0.95, 2) == pytest.approx(math.sqrt(2 * 0.95**2 / (1 - 0.95**2)), abs=1e-11)  # 4.3027


def test_t_distribution_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    for degrees in (1, 2, 2.5, 5, 29, 59.9, 60.1, 999, 1e6):
        for t in (1e-12, 1e-3, 0.5, 1, 1.7, 3, 8, 100):
            expected = 2 * stats.t.sf(t, degrees)
            assert t_p_value(t, degrees) == pytest.approx(expected, rel=1e-10, abs=1e-300)
        for confidence in (0.1, 0.95, 0.999):
            assert t_quantile(confidence, degrees) == pytest.approx(
                stats.t.ppf((1 + confidence) / 2, degrees), rel=1e-10
            )


def test_t_test_by_hand():
    # Mean 2, deviations -1 0 1, variance 1, standard error 1 / sqrt(3): t = 3.4641; p = 1 - t / sqrt(t^2 + 2).
    found = paired_t_test(np.array([1.0, 2.0, 3.0]))
    assert (found.t, found.degrees_of_freedom) == (pytest.approx(math.sqrt(12)), 2)
    assert found.p_value == pytest.approx(1 - math.sqrt(12 / 14))
    # Clusters a (1, 2) and b (6): mean 3, sums less size times mean -3 and 3, so se^2 = 2/1 * 18 / 9 = 4 and t = 1.5.
    found = paired_t_test(np.array([1.0, 2.0, 6.0]), ["a", "a", "b"])
    assert (found.t, found.degrees_of_freedom) == (pytest.approx(1.5), 1)
    assert found.p_value == pytest.approx(1 - 2 / math.pi * math.atan(1.5))
    assert paired_t_test(np.full(4, 0.5)) == significance.TTest(math.inf, 3, 0.0)
    with pytest.raises(ValueError, match="a t test needs at least 2 clusters of questions, found 1"):
        paired_t_test(np.ones(3), ["c"] * 3)


def test_t_test_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = generator(8)
    for num_questions, lift in ((2, 0), (10, 0.5), (300, 0.1)):
        base, other = rng.standard_normal((2, num_questions))
        theirs = stats.ttest_rel(other + lift, base)
        found = paired_t_test(other + lift - base)
        assert (found.t, found.p_value) == pytest.approx((theirs.statistic, theirs.pvalue), rel=1e-10)
    # Clusters of equal size: the test on the means of the clusters.
    differences = rng.standard_normal((20, 3))
    theirs = stats.ttest_1samp(differences.mean(axis=1), 0)
    found = paired_t_test(differences.ravel(), [f"c{i // 3}" for i in range(60)])
    assert (found.t, found.p_value) == pytest.approx((theirs.statistic, theirs.pvalue), rel=1e-10)


# How large, and how many.


def test_equals_ranx():
    """Student's t-test, and Fisher's randomisation test within four standard errors of 20,000 permutations."""
    tests = pytest.importorskip("ranx.statistical_tests")
    rng = generator(4)
    base = rng.choice([0, 1 / 3, 1 / 2, 1], 60)
    for shift in (0.0, 0.06, 0.12):
        other = base + rng.normal(shift, 0.2, 60)
        p_value, _ = tests.paired_student_t_test(base, other)
        assert paired_t_test(other - base).p_value == pytest.approx(p_value, rel=1e-9)
        p_value, _ = tests.fisher_randomization_test(base, other, n_permutations=20_000, random_seed=1)
        ours = sign_flip_p_value(other - base, list(range(60)), generator=generator(), num_samples=20_000)
        assert abs(ours - p_value) < 4 * math.sqrt(2 * p_value * (1 - p_value) / 20_000) + 1e-4


def test_wins_and_effect_size_by_hand():
    assert wins_ties_losses(np.array([0.5, -0.1, 0.0, 0.2, 0.1 + 0.2 - 0.3, -1e-13])) == (2, 3, 1)
    # Mean 2, standard deviation 1
    assert effect_size(np.array([1.0, 2.0, 3.0])) == pytest.approx(2.0)
    assert effect_size(np.array([-1.0, -2.0, -3.0])) == pytest.approx(-2.0)
    assert effect_size(np.full(3, 0.1)) is None
    assert effect_size(np.array([0.1])) is None


def test_questions_needed_by_hand():
    # Variance 2 of (1, -1, 1, -1, ...), to see 0.5 with z = 1.959964 + 0.841621: (2.801585)^2 / 0.25 * s^2, s^2 = 10/9.
    differences = np.tile([1.0, -1.0], 5)
    assert questions_needed(differences, difference=0.5) == math.ceil(10 / 9 * 2.801585**2 / 0.25) == 35
    assert questions_needed(differences, difference=-0.5) == 35
    # Every question four times, as clusters: se^2 = 10/9 * 10 * 16 / 40^2 = 1/9, times 40 for one question.
    clusters = [f"c{i}" for i in range(10)] * 4
    needed = questions_needed(np.tile(differences, 4), clusters, difference=0.5)
    assert needed == math.ceil(40 / 9 * 2.801585**2 / 0.25) == 140
    assert questions_needed(np.zeros(3), difference=0.1) == 1
    assert questions_needed(differences, difference=0.5, power=0.9) > 35
    assert questions_needed(differences, difference=0.5, alpha=0.01) > 35


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"difference": 0.0}, "difference must be a finite number other than 0, not 0.0"),
        ({"difference": math.nan}, "other than 0, not nan"),
        ({"difference": 0.1, "power": 1.0}, "power must lie between 0 and 1, not 1.0"),
        ({"difference": 0.1, "alpha": 5}, "alpha must lie between 0 and 1, not 5"),
        ({"difference": 0.1, "clusters": ["c"] * 3}, "the number of questions needed needs at least 2 clusters"),
    ],
)
def test_questions_needed_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        questions_needed(np.ones(3), **options)


def test_questions_needed_has_the_power_it_says():
    # Documents with three questions whose differences share a part: correlation 0.5, so deff is 1 + 2 * 0.5 = 2.
    rng = generator(11)

    def draw(num_clusters):
        shared, own = rng.standard_normal((num_clusters, 1)), rng.standard_normal((num_clusters, 3))
        return (shared + own).ravel(), np.repeat(np.arange(num_clusters), 3).astype(str)

    pilot, clusters = draw(4000)
    needed = questions_needed(pilot, clusters, difference=0.4, power=0.8)
    assert needed == pytest.approx(2 * 2 * 2.801585**2 / 0.16, rel=0.1)
    assert needed > 1.7 * questions_needed(pilot, difference=0.4, power=0.8)
    found = 0
    for _ in range(400):
        differences, clusters = draw(round(needed / 3))
        found += paired_t_test(differences + 0.4, clusters).p_value <= 0.05
    assert found / 400 == pytest.approx(0.8, abs=3 * math.sqrt(0.8 * 0.2 / 400) + 0.01)


# A recipe.


def test_recipe_by_hand():
    # Seeds' means 1 and 3, m = 2: V_S = (1 + 1) / (2 * 1) = 1. Questions' means 1 and 3: V_C = 2/1 * 2 / 4 = 1.
    # 0, 2 and 2, 4 have no noise left: V = 2. Degrees 2^2 / (1/1 + 1/1) = 2, t = 4.302653.
    found = recipe_interval(np.array([[0.0, 2.0], [2.0, 4.0]]))
    assert (found.difference, found.seed_error, found.question_error) == (2.0, 1.0, 1.0)
    assert found.error == pytest.approx(math.sqrt(2))
    assert found.degrees_of_freedom == pytest.approx(2)
    reach = 4.302653 * math.sqrt(2)
    assert found.interval == pytest.approx((2 - reach, 2 + reach), abs=1e-5)
    # One degree of freedom each: t = 12.706.
    assert found.seed_interval == found.question_interval == pytest.approx((2 - 12.706205, 2 + 12.706205), abs=1e-5)
    assert found.p_value == pytest.approx(1 - math.sqrt(2) / 2)  # t = sqrt(2): 1 - t / sqrt(t^2 + 2)
    assert (found.num_seeds, found.num_queries, found.num_clusters) == (2, 2, 2)
    assert str(found).startswith("difference +2.0000 [-4.0849, +8.0849] at 95%, p = 0.2929, standard error 1.4142 (")


def test_the_noise_of_a_question_under_a_seed_counts_once():
    # Seeds' means 2 and 2: V_S = 0. Questions' means 1 and 3: V_C = 1. Noise -1 1 / 1 -1: V_SC = 4/1 * 4 / 16 = 1.
    # V is not below V_C: max(1 - min(1, 0), 0) = 1.
    found = recipe_interval(np.array([[0.0, 4.0], [2.0, 2.0]]))
    assert (found.seed_error, found.question_error, found.error) == (0.0, 1.0, 1.0)
    # Pure noise, many cells: V_S, V_C and V_SC all estimate the same variance, and V is about it, not twice it.
    errors = [recipe_interval(generator(i).standard_normal((20, 20))).error ** 2 for i in range(100)]
    assert np.mean(errors) == pytest.approx(1 / 400, rel=0.3)


def test_recipe_with_clusters():
    rng = generator(2)
    differences = rng.standard_normal((3, 10)) + rng.standard_normal((3, 1))
    plain = recipe_interval(differences)
    doubled = recipe_interval(np.tile(differences, 2), [f"c{i}" for i in range(10)] * 2)
    for name in ("difference", "seed_error", "question_error", "error", "degrees_of_freedom", "interval", "p_value"):
        assert getattr(doubled, name) == pytest.approx(getattr(plain, name)), name
    assert (doubled.num_queries, doubled.num_clusters) == (20, 10)
    assert recipe_interval(np.tile(differences, 2)).question_error < 0.8 * plain.question_error
    # The questions' part is the paired t test of the seeds' mean.
    uneven = [f"c{i}" for i in (0, 0, 0, 1, 1, 2, 3, 4, 5, 5)]
    mean = differences.mean(axis=0)
    assert recipe_interval(differences, uneven).question_error == pytest.approx(
        mean.mean() / paired_t_test(mean, uneven).t
    )


def test_recipe_without_spread_and_refused():
    found = recipe_interval(np.zeros((3, 5)))
    assert (found.interval, found.p_value, found.degrees_of_freedom) == ((0.0, 0.0), 1.0, 2.0)
    for wrong in (np.ones(5), np.ones((1, 5))):
        with pytest.raises(ValueError, match=r"at least 2 seeds, a row each; found an array of shape \("):
            recipe_interval(wrong)
    with pytest.raises(ValueError, match="a recipe needs at least 2 clusters of questions, found 1"):
        recipe_interval(np.ones((3, 5)), ["c"] * 5)
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1"):
        recipe_interval(np.ones((3, 5)), confidence=95)


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
        low, high = found.interval
        hits += low <= 0 <= high
        narrow += abs(found.difference) <= 1.96 * found.question_error
    assert 0.95 - 3 * math.sqrt(0.05 * 0.95 / 300) <= hits / 300
    if by_seed:
        assert narrow / 300 < 0.87  # questions alone promise too much


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
    rejected = dict.fromkeys(("clusters", "naive", "interval", "bca", "t", "naive t"), 0)
    for _ in range(trials):
        differences = np.repeat(rng.standard_normal(30), 4)
        rejected["clusters"] += sign_flip_p_value(differences, clusters, generator=rng, num_samples=499) <= 0.05
        rejected["naive"] += sign_flip_p_value(differences, generator=rng, num_samples=499) <= 0.05
        low, high = paired_bootstrap_interval(differences, clusters, generator=rng, num_samples=499)
        rejected["interval"] += not low <= 0 <= high
        low, high = paired_bootstrap_interval(differences, clusters, generator=rng, num_samples=499, method="bca")
        rejected["bca"] += not low <= 0 <= high
        rejected["t"] += paired_t_test(differences, clusters).p_value <= 0.05
        rejected["naive t"] += paired_t_test(differences).p_value <= 0.05
    monte_carlo = 3 * np.sqrt(0.05 * 0.95 / trials)
    assert 0.02 < rejected["clusters"] / trials <= 0.05 + monte_carlo
    assert 0.02 < rejected["t"] / trials <= 0.05 + monte_carlo
    assert rejected["naive"] / trials > 0.25
    assert rejected["naive t"] / trials > 0.25
    assert rejected["bca"] / trials <= 0.09 + monte_carlo
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
