"""power.py against published sample sizes, SciPy's noncentral t, and the test itself on simulated differences."""

import math

import numpy as np
import pytest

from embedft.retrieval.power import questions_needed, t_power
from embedft.retrieval.significance import Variance, recipe_interval, variance_of


def one_seed(effect_size: float, num_queries: int = 50) -> Variance:
    """A mean difference of `effect_size` standard deviations of the questions."""
    return Variance(effect_size, 0.0, 1 / num_queries, 0.0, 1, num_queries, num_queries)


@pytest.mark.parametrize(("effect_size", "expected"), [(0.8, 15), (0.5, 34), (0.2, 199), (0.1, 787), (-0.5, 34)])
def test_sample_sizes_of_the_paired_t_test(effect_size, expected):
    """Two-sided 5%, power 0.8: 15, 34, 199 and 787 pairs in G*Power's and Cohen's tables, whatever was observed."""
    assert [questions_needed(one_seed(effect_size, number)) for number in (20, 50, 999)] == [expected] * 3


def test_power_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    for degrees in (1, 1.3, 2, 3, 5, 10, 100, 1e4):
        for effect in (0, 0.5, 2, 2.8, 5, 8):
            critical = stats.t.ppf(0.975, degrees)
            other_tail = np.nan_to_num(stats.nct.cdf(-critical, degrees, effect))  # SciPy has NaN for some near 0
            expected = stats.nct.sf(critical, degrees, effect) + other_tail
            assert t_power(effect, degrees) == pytest.approx(expected, abs=3e-6)
    assert t_power(0.0, 7) == pytest.approx(0.05, abs=1e-7)
    assert t_power(math.inf, 2) == 1.0


def test_clusters_count_rather_than_their_questions():
    # Each question three times over: as many clusters, three times as many questions.
    differences = np.random.default_rng(0).normal(0.4, 1.0, (1, 60))
    alone = questions_needed(variance_of((differences, None)))
    tripled = variance_of((np.tile(differences, 3), [f"c{i}" for i in range(60)] * 3))
    assert 30 < alone < 150
    assert questions_needed(tripled) == pytest.approx(3 * alone, abs=3)


def test_the_variance_of_seeds_is_a_floor():
    """By hand: V_S 0.05 with V_SC 0.01 leaves 0.04 for any number of questions; 0.2 parts are divided by their number.
    Then |mean| / 0.2 is 3 for a mean of 0.6; two degrees of freedom take 5.65 for a power of 0.8, hundreds 2.80."""
    variance = Variance(1.2, 0.05, 0.2, 0.01, 3, 100, 100)
    assert variance.at(1) == variance
    assert variance.at(10).seeds == pytest.approx(0.04 + 0.001)
    assert variance.at(10).total == pytest.approx(0.04 + 0.02)
    assert math.isfinite(questions_needed(variance))
    assert math.isinf(questions_needed(Variance(0.5, 0.05, 0.2, 0.01, 3, 100, 100)))
    # Without seeds of their own, enough questions detect anything but nothing.
    assert math.isfinite(questions_needed(Variance(0.001, 0.01, 0.2, 0.01, 3, 100, 100)))
    assert math.isinf(questions_needed(Variance(0.0, 0.01, 0.2, 0.01, 3, 100, 100)))
    assert questions_needed(Variance(0.3, 0.0, 0.0, 0.0, 3, 50, 100)) == 4  # no variance: two clusters of two


@pytest.mark.slow
def test_the_test_has_the_power_that_was_asked_for():
    """Crossed effects of 4 seeds and of questions: at the number found, `recipe_interval` rejects in about 80%."""
    mean, seed, question, noise = 0.12, 0.04, 0.3, 0.5
    variance = Variance(
        mean, seed**2 / 4 + noise**2 / 800, question**2 / 200 + noise**2 / 800, noise**2 / 800, 4, 200, 200
    )
    number = int(questions_needed(variance))
    assert 50 < number < 2_000
    generator, found = np.random.default_rng(1), 0
    for _ in range(1_500):
        effects = generator.normal(0, seed, (4, 1)) + generator.normal(0, question, (1, number))
        differences = mean + effects + generator.normal(0, noise, (4, number))
        found += recipe_interval(differences)["p_value"] < 0.05
    assert found / 1_500 == pytest.approx(0.8, abs=0.05)  # degrees of freedom are estimated there, and known here


def test_the_average_over_test_sets_by_hand():
    # Means 1 and 3 by seed on the first set, 0 and 0 on the second: 0.5 and 1.5, so V_S = 0.5 / 2 = 0.25.
    # V_C is 1 on the first (test_recipe_by_hand) and 2/1 * (1 + 1) / 4 = 1 on the second: (1 + 1) / 4 = 0.5.
    first, second = np.array([[0.0, 2.0], [2.0, 4.0]]), np.array([[-1.0, 1.0], [-1.0, 1.0]])
    found = variance_of((first, None), (second, None))
    assert (found.mean, found.seeds, found.questions, found.noise) == (1.0, 0.25, 0.5, 0.0)
    assert (found.num_seeds, found.num_clusters, found.num_queries, found.num_sets) == (2, 4, 4, 2)
    assert found.total == 0.75
    assert found.degrees == pytest.approx(0.75**2 / (0.25**2 / 1 + 0.5**2 / 2))
