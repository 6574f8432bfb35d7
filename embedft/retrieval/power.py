"""Power: how many questions it would take to detect a difference that has been observed.

    variance = variance_of((differences_SQ, clusters))       # significance.py
    questions_needed(variance)                               # math.inf where seeds alone vary too much

Shapes: S seeds, Q questions, N points of a quadrature.
"""

import math

import numpy as np

from .significance import Variance, t_quantile

STEP, MOST = 1.2, 1e8  # the search for a number of questions: factor from one to the next, and where it gives up


def questions_needed(variance: Variance, *, power: float = 0.8) -> float:
    """The least number of questions with which the test of `recipe_interval`, two-sided at 5%, would find a true
    difference as large as the observed one with probability `power`, given as many seeds; `math.inf` if none would.

    The new questions come in clusters of the same sizes. With V_S, V_C and V_SC of `recipe_interval`, n in place of Q
    questions leave max(V_S - V_SC, 0), the variance of the seeds themselves, and divide the rest by n / Q. At n, the
    statistic has a noncentral t distribution with noncentrality |mean| / sqrt(V(n)) and Satterthwaite's degrees of
    freedom at n. For one seed, it is the sample size of a paired t-test over clusters. The effect is taken as observed,
    so a small p-value by luck means too few questions here.

    Source: Hillis, Obuchowski & Berbaum, "Power estimation for multireader ROC methods: an updated and unified
    approach", 2011 (their readers are seeds, their cases questions); for retrieval: Webber, Moffat & Zobel,
    "Statistical power in retrieval experimentation", CIKM 2008."""

    def is_enough(num_questions: int) -> bool:
        then = variance.at(num_questions / variance.num_queries)
        effect = abs(variance.mean) / math.sqrt(then.total) if then.total > 0 else math.inf
        return t_power(effect, then.degrees) >= power

    if variance.mean == 0:
        return math.inf
    # Two clusters of each test set: then there is a degree of freedom. More questions lower the variance, but in the
    # end also the degrees of freedom, to those of the seeds; so the power may rise and fall, and the search goes up.
    least = math.ceil(2 * variance.num_sets * variance.num_queries / variance.num_clusters)
    too_few, enough = least - 1, least
    while not is_enough(enough):
        if enough > MOST * variance.num_queries:
            return math.inf
        too_few, enough = enough, math.ceil(STEP * enough)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if is_enough(middle) else (middle, enough)
    return float(enough)


def t_power(effect: float, degrees: float) -> float:
    """The power of a two-sided t-test at 5%: P(|T| > c) for noncentral t with noncentrality `effect`, to about 2e-6.

    T is (Z + effect) / W with W^2 chi-squared over its degrees of freedom v, so P is the mean over W of
    Phi(effect - c W) + Phi(-effect - c W). In u = log W, the density is proportional to exp(v (u - exp(2u) / 2))."""
    if math.isinf(effect):
        return 1.0
    width = 8 / math.sqrt(degrees)
    u_N = np.linspace(-width - 20 / degrees, min(width, 2.0), 600)
    density_N = np.exp(degrees * (u_N + 0.5 - np.exp(2 * u_N) / 2))
    cut_N = t_quantile(0.95, degrees) * np.exp(u_N)
    beyond_N = [math.erfc((cut - effect) / math.sqrt(2)) + math.erfc((cut + effect) / math.sqrt(2)) for cut in cut_N]
    return float(density_N @ np.array(beyond_N) / (2 * density_N.sum()))
