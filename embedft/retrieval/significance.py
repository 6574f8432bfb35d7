"""Is a difference real? Paired bootstrap intervals, permutation and t test, effect size, Holm, a recipe; NumPy alone.

Questions are not independent when they share a document (synthetic data has two a chunk): a model that embeds the
document well answers both. Such questions form a cluster, and clusters, not questions, are resampled and sign-flipped.

    generator = np.random.default_rng(0)
    low, high = paired_bootstrap_interval(differences_Q, clusters, generator=generator)
    p_value = sign_flip_p_value(differences_Q, clusters, generator=generator)

Deliberately not here: what is compared with what, and refused (report.py).

Shapes: Q questions, C clusters, S seeds, B random samples of one block.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

from .t_distribution import t_p_value, t_quantile

IntervalMethod = Literal["percentile", "bca"]

# Random values held at once, in all blocks of samples together: bounds memory (a few tens of MB) and fits the cache.
BLOCK_VALUES = 1 << 20
# Differences smaller than this are rounding: the same value summed in another order.
ROUNDING = 1e-12


def paired_bootstrap_interval(
    differences_Q: np.ndarray,
    clusters: Sequence[str] | None = None,
    *,
    generator: np.random.Generator,
    num_samples: int = 10_000,
    confidence: float = 0.95,
    method: IntervalMethod = "percentile",
) -> tuple[float, float]:
    """The bootstrap interval of the mean difference, clusters drawn with replacement.

    Each sample draws C clusters and has the mean (sum of the differences in them) / (number of questions in them).
    "percentile": the interval runs between the (1 - confidence) / 2 quantiles at either end. "bca": between the
    quantiles Phi(z0 + (z0 + z) / (1 - a (z0 + z))), z the normal quantile of either end, z0 that of the share of the
    samples below the observed mean (half of those equal to it), and a = sum d^3 / (6 (sum d^2)^1.5) with d the mean of
    the jackknife means less each of them, a jackknife mean leaving out one cluster. It follows a skewed distribution,
    as few questions that change much make it. With few clusters both are too narrow, and with one they are a point.

    Args:
        differences_Q: [Q] per-question differences between two systems on the same questions.
        clusters: Q cluster ids; None: every question on its own.

    Source: Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 13 and 14; Sakai, "Evaluating
    evaluation metrics based on the bootstrap", SIGIR 2006. Clusters: Field & Welsh, "Bootstrapping clustered data",
    JRSS B 2007.
    """
    _check_share("confidence", confidence)
    if method not in ("percentile", "bca"):
        raise ValueError(f"unknown method {method!r}; valid: percentile, bca")
    sums_C, sizes_C = _cluster_sums(differences_Q, clusters)
    num_clusters, one_size = len(sums_C), bool((sizes_C == sizes_C[0]).all())
    means = []
    for num_rows in _blocks(num_samples, num_clusters):
        drawn_BC = generator.integers(0, num_clusters, size=(num_rows, num_clusters))
        num_questions = sizes_C.sum() if one_size else _sums_of(sizes_C, drawn_BC)
        means.append(_sums_of(sums_C, drawn_BC) / num_questions)
    means = np.concatenate(means)
    shares = np.array([(1 - confidence) / 2, (1 + confidence) / 2])
    if method == "bca" and num_clusters > 1:
        shares = _bca_shares(shares, means, sums_C, sizes_C)
    low, high = np.quantile(means, shares)
    return float(low), float(high)


def _sums_of(values_C: np.ndarray, drawn_BC: np.ndarray) -> np.ndarray:
    return np.take(values_C, drawn_BC, mode="clip").sum(axis=1)  # "clip" checks no index, and none is wrong


def _bca_shares(shares: np.ndarray, means: np.ndarray, sums_C: np.ndarray, sizes_C: np.ndarray) -> np.ndarray:
    """The shares at which BCa takes the quantiles of `means`, for those at which the percentile interval does."""
    total, num_questions = sums_C.sum(), sizes_C.sum()
    slack = ROUNDING * np.abs(sums_C).sum() / num_questions
    observed = total / num_questions
    below = ((means < observed - slack).mean() + (means <= observed + slack).mean()) / 2
    normal = NormalDist()
    # No sample on one side of the observed mean says that fewer than one in all samples is there, not that none is.
    bias = normal.inv_cdf(min(max(below, 0.5 / len(means)), 1 - 0.5 / len(means)))
    jackknife_C = (total - sums_C) / (num_questions - sizes_C)
    deviations_C = jackknife_C.mean() - jackknife_C
    spread = (deviations_C**2).sum() ** 1.5
    acceleration = (deviations_C**3).sum() / (6 * spread) if spread > 0 else 0.0
    shifted = [bias + normal.inv_cdf(share) for share in shares]
    # The divisor is not above 0 only far outside of what the samples cover: then the last sample.
    return np.array([normal.cdf(bias + z / max(1 - acceleration * z, 1e-9)) for z in shifted])


def sign_flip_p_value(
    differences_Q: np.ndarray,
    clusters: Sequence[str] | None = None,
    *,
    generator: np.random.Generator,
    num_samples: int = 10_000,
) -> float:
    """The two-sided p-value of a paired permutation test: under the null, the two systems may be swapped.

    Swapping them flips the sign of a difference; the questions of a cluster are swapped together. p = (1 + hits) /
    (1 + num_samples), where a hit is a sample whose |mean| is at least the observed one.

    Args:
        differences_Q: [Q] per-question differences between two systems on the same questions.
        clusters: Q cluster ids; None: every question on its own.

    Source: Smucker, Allan & Carterette, "A comparison of statistical significance tests for information retrieval
    evaluation", CIKM 2007; the added 1: Phipson & Smyth, "Permutation p-values should never be zero", 2010.
    """
    sums_C, _ = _cluster_sums(differences_Q, clusters)
    total = sums_C.sum()
    # Sums of the same numbers in another order differ by rounding; without slack an exact tie would not be a hit.
    least = abs(total) - ROUNDING * np.abs(sums_C).sum()
    hits = 0
    for num_rows in _blocks(num_samples, len(sums_C)):
        random_bytes = generator.integers(0, 256, size=(num_rows, -(-len(sums_C) // 8)), dtype=np.uint8)
        kept_BC = np.unpackbits(random_bytes, axis=1, count=len(sums_C))
        flipped_total_B = 2 * (kept_BC @ sums_C) - total  # sum of +s where the bit is 1 and -s where it is 0
        hits += int((np.abs(flipped_total_B) >= least).sum())
    return (1 + hits) / (1 + num_samples)


@dataclass(frozen=True)
class TTest:
    """The result of `paired_t_test`.

    Args:
        t: mean difference / its standard error.
        degrees_of_freedom: clusters - 1.
        p_value: two-sided.
    """

    t: float
    degrees_of_freedom: int
    p_value: float


def paired_t_test(differences_Q: np.ndarray, clusters: Sequence[str] | None = None) -> TTest:
    """Student's paired t test of a mean difference of 0; with clusters, t by the cluster-robust standard error.

    t = mean / se with se^2 = C / (C - 1) * sum over clusters of (sum in the cluster - its number of questions * mean)^2
    / Q^2, against the t distribution with C - 1 degrees of freedom. With every question on its own this is the usual
    test; with clusters of equal size it is the usual test on the clusters' means. Differences without spread have t 0
    and p 1 when they are 0, else an infinite t and p 0.

    Raises:
        ValueError: on a single cluster, which has no spread to measure by.

    Source: Student, "The probable error of a mean", 1908. Clusters: Liang & Zeger, "Longitudinal data analysis using
    generalized linear models", Biometrika 1986; the degrees of freedom: Cameron & Miller, "A practitioner's guide to
    cluster-robust inference", Journal of Human Resources 2015, section VI.
    """
    sums_C, sizes_C = _cluster_sums(differences_Q, clusters)
    _need_clusters(len(sums_C), "a t test")
    mean, error = sums_C.sum() / sizes_C.sum(), math.sqrt(_variance_of_mean(sums_C, sizes_C))
    t = _ratio(float(mean), error)
    return TTest(t, len(sums_C) - 1, t_p_value(t, len(sums_C) - 1))


def wins_ties_losses(differences_Q: np.ndarray) -> tuple[int, int, int]:
    """How many questions have a difference above, of and below 0; less than 1e-12 either way is rounding, a tie."""
    differences_Q, _ = _cluster_sums(differences_Q, None)
    wins, losses = int((differences_Q > ROUNDING).sum()), int((differences_Q < -ROUNDING).sum())
    return wins, len(differences_Q) - wins - losses, losses


def effect_size(differences_Q: np.ndarray) -> float | None:
    """Cohen's d_z: mean difference / standard deviation of the differences (divisor Q - 1).

    By convention 0.2 is small, 0.5 medium and 0.8 large. It describes the questions at hand, so clusters do not enter.
    0 when all differences are 0; None when they are equal and not 0, or there is one: nothing to measure them by.

    Source: Cohen, "Statistical Power Analysis for the Behavioral Sciences", 1988, section 2.3.5; Lakens, "Calculating
    and reporting effect sizes", Frontiers in Psychology 2013.
    """
    differences_Q, _ = _cluster_sums(differences_Q, None)
    if not differences_Q.any():
        return 0.0
    if np.ptp(differences_Q) <= ROUNDING:
        return None
    return float(differences_Q.mean() / differences_Q.std(ddof=1))


def questions_needed(
    differences_Q: np.ndarray,
    clusters: Sequence[str] | None = None,
    *,
    difference: float,
    power: float = 0.8,
    alpha: float = 0.05,
) -> int:
    """The number of questions at which a mean difference of `difference` is found with probability `power`.

    ceil(deff * s^2 * (z_(1 - alpha/2) + z_power)^2 / difference^2), where s is the standard deviation of the
    differences at hand and deff their design effect: the cluster-robust variance of their mean (`paired_t_test`) over
    s^2 / Q. It is about the number of questions a cluster where those of a cluster always agree. The normal
    approximation of a two-sided test at level `alpha`; further questions are taken to be like these, in clusters like
    theirs.

    Args:
        differences_Q: [Q] per-question differences of a first comparison.
        clusters: Q cluster ids; None: every question on its own.
        difference: the mean difference worth finding, in the metric's unit; its sign does not matter.

    Raises:
        ValueError: on a difference of 0, a power or alpha outside (0, 1), or a single cluster.

    Source: Webber, Moffat & Zobel, "Statistical power in retrieval experimentation", CIKM 2008; the design effect:
    Kish, "Survey Sampling", 1965, section 8.2.
    """
    _check_share("power", power)
    _check_share("alpha", alpha)
    if not np.isfinite(difference) or difference == 0:
        raise ValueError(f"difference must be a finite number other than 0, not {difference}")
    sums_C, sizes_C = _cluster_sums(differences_Q, clusters)
    _need_clusters(len(sums_C), "the number of questions needed")
    variance = _variance_of_mean(sums_C, sizes_C) * sizes_C.sum()  # deff * s^2: that of one question
    z = NormalDist().inv_cdf(1 - alpha / 2) + NormalDist().inv_cdf(power)
    return max(1, math.ceil(variance * (z / difference) ** 2 * (1 - ROUNDING)))  # no question more by rounding


@dataclass(frozen=True)
class RecipeInterval:
    """What `recipe_interval` found: the mean difference and what it is uncertain by.

    Args:
        difference: mean over seeds and questions.
        question_error: standard error by the questions: other questions, the same seeds.
        seed_error: standard error by the seeds: other seeds, the same questions.
        error: standard error by both: other seeds and other questions.
        question_interval, seed_interval, interval: difference - and + t * each of these errors.
        degrees_of_freedom: of `interval`.
        p_value: two-sided t test of a difference of 0 by `error`.
        num_seeds, num_queries, num_clusters: what it rests on.
    """

    difference: float
    question_error: float
    seed_error: float
    error: float
    question_interval: tuple[float, float]
    seed_interval: tuple[float, float]
    interval: tuple[float, float]
    degrees_of_freedom: float
    p_value: float
    confidence: float
    num_seeds: int
    num_queries: int
    num_clusters: int

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"difference {self.difference:+.4f} [{low:+.4f}, {high:+.4f}] at {self.confidence:.0%}, "
            f"p = {self.p_value:.4f}, standard error {self.error:.4f} (questions {self.question_error:.4f}, "
            f"seeds {self.seed_error:.4f}), {self.num_seeds} seeds, {self.num_queries} questions in "
            f"{self.num_clusters} clusters"
        )


def recipe_interval(
    differences_SQ: np.ndarray, clusters: Sequence[str] | None = None, *, confidence: float = 0.95
) -> RecipeInterval:
    """The interval of a recipe's mean difference, over other seeds and other questions.

    Seeds and clusters of questions are crossed random effects. With m the overall mean, m_s a seed's, and r_cs the sum
    in cluster c under seed s less its number of questions times m:

        seeds       V_S = sum over s of (m_s - m)^2 / (S (S - 1))
        questions   V_C = C / (C - 1) * sum over c of (mean over s of r_cs)^2 / Q^2
        both        V = V_S + max(V_C - min(V_SC, V_S), 0)

    V_SC = S C / ((S - 1) (C - 1)) * sum over c, s of e_cs^2 / (S Q)^2, e_cs being r_cs less its mean over s and less
    the cluster's number of questions times (m_s - m), is the noise of a question under a seed. It is part of V_S and of
    V_C and counts once; V is never below either of them.

    The intervals are difference +- t * sqrt(V); t has S - 1 and C - 1 degrees of freedom for V_S and V_C, and
    V^2 / (V_S^2 / (S - 1) + (V - V_S)^2 / (C - 1)) for both. Where the seeds vary most, a bootstrap over three of them
    is too narrow by a factor of two to three; t is as wide as three deserve (4.3 standard errors).

    Args:
        differences_SQ: [S, Q] per-question differences, a row a seed: recipe less base, either the same base in every
            row or the base trained with the same seed.
        clusters: Q cluster ids; None: every question on its own.

    Raises:
        ValueError: on fewer than two seeds or two clusters.

    Source: Hillis, "A comparison of denominator degrees of freedom methods for multiple observer ROC analysis",
    Statistics in Medicine 2007 (readers are the seeds, cases the questions); Satterthwaite, "An approximate
    distribution of estimates of variance components", 1946; clusters: Cameron, Gelbach & Miller, "Robust inference with
    multiway clustering", JBES 2011.
    """
    _check_share("confidence", confidence)
    differences_SQ = np.asarray(differences_SQ, dtype=np.float64)
    if differences_SQ.ndim != 2 or len(differences_SQ) < 2:
        found = f"found an array of shape {differences_SQ.shape}"
        raise ValueError(f"a recipe needs the differences of at least 2 seeds, a row each; {found}")
    rows = [_cluster_sums(row, clusters) for row in differences_SQ]
    sums_SC, sizes_C = np.stack([sums_C for sums_C, _ in rows]), rows[0][1]
    num_seeds, num_clusters, num_queries = *sums_SC.shape, differences_SQ.shape[1]
    _need_clusters(num_clusters, "a recipe")
    seed_means_S = sums_SC.sum(axis=1) / num_queries
    mean = float(seed_means_S.mean())
    by_seed = float(seed_means_S.var(ddof=1)) / num_seeds
    by_question = _variance_of_mean(sums_SC.mean(axis=0), sizes_C)
    noise_SC = sums_SC - sums_SC.mean(axis=0) - sizes_C * (seed_means_S - mean)[:, None]
    cells = num_seeds * num_clusters / ((num_seeds - 1) * (num_clusters - 1))
    by_noise = cells * float((noise_SC**2).sum()) / (num_seeds * num_queries) ** 2
    more = max(by_question - min(by_noise, by_seed), 0.0)
    both = by_seed + more
    spread = by_seed**2 / (num_seeds - 1) + more**2 / (num_clusters - 1)
    degrees = both**2 / spread if spread > 0 else float(num_seeds - 1)

    def interval(variance: float, degrees: float) -> tuple[float, float]:
        reach = t_quantile(confidence, degrees) * math.sqrt(variance)
        return mean - reach, mean + reach

    return RecipeInterval(
        difference=mean,
        question_error=math.sqrt(by_question),
        seed_error=math.sqrt(by_seed),
        error=math.sqrt(both),
        question_interval=interval(by_question, num_clusters - 1),
        seed_interval=interval(by_seed, num_seeds - 1),
        interval=interval(both, degrees),
        degrees_of_freedom=degrees,
        p_value=t_p_value(_ratio(mean, math.sqrt(both)), degrees),
        confidence=confidence,
        num_seeds=num_seeds,
        num_queries=num_queries,
        num_clusters=num_clusters,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of m p-values: the i-th smallest times (m - i + 1), never falling, at most 1.

    Source: Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    p_values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(np.maximum.accumulate(p_values[order] * np.arange(len(order), 0, -1)), 1.0)
    return adjusted.tolist()


def _cluster_sums(differences_Q: np.ndarray, clusters: Sequence[str] | None) -> tuple[np.ndarray, np.ndarray]:
    """The sum of the differences and the number of questions of every cluster, [C] float64 each."""
    differences_Q = np.asarray(differences_Q, dtype=np.float64)
    if differences_Q.ndim != 1 or len(differences_Q) == 0 or not np.isfinite(differences_Q).all():
        raise ValueError(f"differences must be a row of finite numbers, one a question: shape {differences_Q.shape}")
    if clusters is None:
        return differences_Q, np.ones_like(differences_Q)
    if len(clusters) != len(differences_Q):
        raise ValueError(f"{len(clusters)} cluster ids for {len(differences_Q)} questions")
    _, cluster_Q = np.unique(np.asarray(clusters), return_inverse=True)
    return np.bincount(cluster_Q, weights=differences_Q), np.bincount(cluster_Q).astype(np.float64)


def _check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie between 0 and 1, not {value}")


def _need_clusters(num_clusters: int, what: str) -> None:
    if num_clusters < 2:
        raise ValueError(f"{what} needs at least 2 clusters of questions, found 1")


def _variance_of_mean(sums_C: np.ndarray, sizes_C: np.ndarray) -> float:
    """The cluster-robust variance of the mean over all questions, with the factor C / (C - 1)."""
    mean = sums_C.sum() / sizes_C.sum()
    squares = ((sums_C - sizes_C * mean) ** 2).sum()
    return float(len(sums_C) / (len(sums_C) - 1) * squares / sizes_C.sum() ** 2)


def _ratio(mean: float, error: float) -> float:
    """mean / error, also where there is no error."""
    if error > 0:
        return mean / error
    return math.copysign(math.inf, mean) if mean else 0.0


def _blocks(num_samples: int, num_clusters: int) -> Iterator[int]:
    """The sizes of blocks that add up to `num_samples`."""
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, not {num_samples}")
    rows = max(1, BLOCK_VALUES // num_clusters)
    for start in range(0, num_samples, rows):
        yield min(rows, num_samples - start)
