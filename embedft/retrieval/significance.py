"""Is a difference real? Paired bootstrap intervals, permutation tests, seed-and-question intervals, Holm; NumPy only.

Questions that share a document are not independent evidence: a model that embeds the document well answers all of them.
Such questions form a cluster, and every function here resamples or sign-flips whole clusters.

    generator = np.random.default_rng(0)
    low, high = paired_bootstrap_interval(differences_Q, clusters, generator=generator)
    p_value = sign_flip_p_value(differences_Q, clusters, generator=generator)
    recipe = recipe_interval(differences_SQ, clusters)       # a row per training seed

Shapes: Q questions, C clusters, S seeds, B random samples of one block.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

IntervalMethod = Literal["percentile", "bca"]

# Smaller differences are rounding errors: the same values summed in another order.
ROUNDING = 1e-12


def paired_bootstrap_interval(
    differences_Q: np.ndarray,
    clusters: Sequence[str] | None = None,
    *,
    generator: np.random.Generator,
    num_samples: int = 10_000,
    confidence: float = 0.95,
    method: IntervalMethod = "percentile",
    block_values: int = 1 << 20,
) -> tuple[float, float]:
    """Bootstrap interval of the mean difference, with whole clusters drawn with replacement.

    A sample's mean is (sum of the differences in its C clusters) / (number of their questions). "percentile" takes the
    (1 - confidence) / 2 and (1 + confidence) / 2 quantiles of these means. "bca" corrects for bias and skew, which
    appear when a few questions change a lot: it takes the quantiles Phi(z0 + (z0 + z) / (1 - a (z0 + z))), where z is
    the normal quantile of either end, z0 that of the share of samples below the observed mean (ties count half), and
    a = sum d^3 / (6 (sum d^2)^1.5), d being the average leave-one-cluster-out mean minus each such mean. With few
    clusters both intervals are too narrow; with one they are a point.

    Args:
        differences_Q: [Q] per-question differences between two systems on the same questions.
        clusters: Q cluster ids; None: every question is its own cluster.
        block_values: random values drawn at a time; bounds memory.

    Source: Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 13 and 14; Sakai, "Evaluating
    evaluation metrics based on the bootstrap", SIGIR 2006. Clusters: Field & Welsh, "Bootstrapping clustered data",
    JRSS B 2007.
    """
    if not 0 < confidence < 1 or method not in ("percentile", "bca"):
        found = f"confidence is {confidence}, method is {method!r}"
        raise ValueError(f"{found}; expected a confidence between 0 and 1, and percentile or bca")
    sums_C, sizes_C = _cluster_sums(differences_Q, clusters)
    num_clusters, one_size = len(sums_C), bool((sizes_C == sizes_C[0]).all())
    means = []
    for num_rows in _blocks(num_samples, num_clusters, block_values):
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
    return np.take(values_C, drawn_BC, mode="clip").sum(axis=1)  # "clip" skips the bounds check


def _bca_shares(shares: np.ndarray, means: np.ndarray, sums_C: np.ndarray, sizes_C: np.ndarray) -> np.ndarray:
    """Moves the percentile interval's two shares to where BCa takes the quantiles of `means`."""
    total, num_questions = sums_C.sum(), sizes_C.sum()
    slack = ROUNDING * np.abs(sums_C).sum() / num_questions
    observed = total / num_questions
    below = ((means < observed - slack).mean() + (means <= observed + slack).mean()) / 2
    normal = NormalDist()
    # Without any sample on one side of the observed mean, assume half a sample there rather than none.
    bias = normal.inv_cdf(min(max(below, 0.5 / len(means)), 1 - 0.5 / len(means)))
    jackknife_C = (total - sums_C) / (num_questions - sizes_C)
    deviations_C = jackknife_C.mean() - jackknife_C
    spread = (deviations_C**2).sum() ** 1.5
    acceleration = (deviations_C**3).sum() / (6 * spread) if spread > 0 else 0.0
    shifted = [bias + normal.inv_cdf(share) for share in shares]
    # The divisor is at or below 0 only far outside the range of the samples; that end is then the extreme sample.
    return np.array([normal.cdf(bias + z / max(1 - acceleration * z, 1e-9)) for z in shifted])


def sign_flip_p_value(
    differences_Q: np.ndarray,
    clusters: Sequence[str] | None = None,
    *,
    generator: np.random.Generator,
    num_samples: int = 10_000,
    block_values: int = 1 << 20,
) -> float:
    """Two-sided p-value of a paired permutation test: under the null hypothesis the two systems can be swapped.

    Swapping flips the sign of a difference; questions of a cluster are swapped together. p = (1 + hits) /
    (1 + num_samples), where a hit is a sample whose |mean| is at least the observed one.

    Args: see `paired_bootstrap_interval`.

    Source: Smucker, Allan & Carterette, "A comparison of statistical significance tests for information retrieval
    evaluation", CIKM 2007; the added 1: Phipson & Smyth, "Permutation p-values should never be zero", 2010.
    """
    sums_C, _ = _cluster_sums(differences_Q, clusters)
    total = sums_C.sum()
    # Allow for rounding in sums of the same numbers in another order, or an exact tie might not count as a hit.
    least = abs(total) - ROUNDING * np.abs(sums_C).sum()
    hits = 0
    for num_rows in _blocks(num_samples, len(sums_C), block_values):
        random_bytes = generator.integers(0, 256, size=(num_rows, -(-len(sums_C) // 8)), dtype=np.uint8)
        kept_BC = np.unpackbits(random_bytes, axis=1, count=len(sums_C))
        flipped_total_B = 2 * (kept_BC @ sums_C) - total  # sum of +s where the bit is 1 and -s where it is 0
        hits += int((np.abs(flipped_total_B) >= least).sum())
    return (1 + hits) / (1 + num_samples)


def wins_ties_losses(differences_Q: np.ndarray) -> tuple[int, int, int]:
    """Number of questions with a difference above, equal to and below 0, up to rounding (1e-12)."""
    wins, losses = int((differences_Q > ROUNDING).sum()), int((differences_Q < -ROUNDING).sum())
    return wins, len(differences_Q) - wins - losses, losses


@dataclass(frozen=True)
class RecipeInterval:
    """A recipe's mean difference and its uncertainty, see `recipe_interval`.

    `interval`, the two-sided `p_value` and the standard error `error` (on `degrees_of_freedom`) are for new seeds and
    new questions; `question_error` for new questions with these seeds, `seed_error` for new seeds on these questions.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float
    error: float
    question_error: float
    seed_error: float
    degrees_of_freedom: float


def recipe_interval(
    differences_SQ: np.ndarray, clusters: Sequence[str] | None = None, *, confidence: float = 0.95
) -> RecipeInterval:
    """Interval of a training recipe's mean difference that covers new seeds as well as new questions.

    Seeds and clusters of questions are crossed random effects. With m the overall mean, m_s the mean of seed s, and
    r_cs the sum over cluster c under seed s minus its number of questions times m:

        seeds       V_S = sum over s of (m_s - m)^2 / (S (S - 1))
        questions   V_C = C / (C - 1) * sum over c of (mean over s of r_cs)^2 / Q^2
        both        V = V_S + max(V_C - min(V_SC, V_S), 0)

    V_SC = S C / ((S - 1) (C - 1)) * sum over c, s of e_cs^2 / (S Q)^2 is the noise of a question under a seed, where
    e_cs is r_cs minus its mean over s and minus the cluster's number of questions times (m_s - m). Both V_S and V_C
    contain it, so it is subtracted once; V is never below either of them. The interval is difference +- t * sqrt(V)
    with V^2 / (V_S^2 / (S - 1) + (V - V_S)^2 / (C - 1)) degrees of freedom. With three seeds that vary, a bootstrap is
    two to three times too narrow.

    Args:
        differences_SQ: [S, Q], one row per seed (at least two): recipe minus base, where the base is either the same in
            every row or trained with the same seed.
        clusters: Q cluster ids, at least two different ones; None: every question is its own cluster.

    Source: Hillis, "A comparison of denominator degrees of freedom methods for multiple observer ROC analysis",
    Statistics in Medicine 2007 (readers are seeds, cases are questions); Satterthwaite, "An approximate distribution of
    estimates of variance components", 1946; clusters: Cameron, Gelbach & Miller, "Robust inference with multiway
    clustering", JBES 2011.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, expected a number between 0 and 1")
    differences_SQ = np.asarray(differences_SQ, dtype=np.float64)
    if differences_SQ.ndim != 2 or len(differences_SQ) < 2:
        raise ValueError(
            f"found differences of shape {differences_SQ.shape}, expected a row for each of 2 or more seeds"
        )
    rows = [_cluster_sums(row, clusters) for row in differences_SQ]
    sums_SC, sizes_C = np.stack([sums_C for sums_C, _ in rows]), rows[0][1]
    (num_seeds, num_clusters), num_queries = sums_SC.shape, differences_SQ.shape[1]
    if num_clusters < 2:
        raise ValueError("found 1 cluster of questions, expected at least 2")
    seed_means_S = sums_SC.sum(axis=1) / num_queries
    mean = float(seed_means_S.mean())
    by_seed = float(seed_means_S.var(ddof=1)) / num_seeds
    centred_SC = sums_SC - sizes_C * mean
    by_question = num_clusters / (num_clusters - 1) * float((centred_SC.mean(axis=0) ** 2).sum()) / num_queries**2
    noise_SC = sums_SC - sums_SC.mean(axis=0) - sizes_C * (seed_means_S - mean)[:, None]
    cells = num_seeds * num_clusters / ((num_seeds - 1) * (num_clusters - 1))
    by_noise = cells * float((noise_SC**2).sum()) / (num_seeds * num_queries) ** 2
    more = max(by_question - min(by_noise, by_seed), 0.0)
    error = math.sqrt(by_seed + more)
    spread = by_seed**2 / (num_seeds - 1) + more**2 / (num_clusters - 1)
    degrees = (by_seed + more) ** 2 / spread if spread > 0 else float(num_seeds - 1)
    reach = _t_quantile(confidence, degrees) * error
    p_value = _t_p_value(mean / error, degrees) if error > 0 else float(mean == 0)
    errors = error, math.sqrt(by_question), math.sqrt(by_seed)
    return RecipeInterval(mean, (mean - reach, mean + reach), p_value, *errors, degrees)


_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(64)


def _t_within(angle: float, degrees: float) -> float:
    """P(|T| <= sqrt(degrees) tan(angle)) for Student's t with `degrees` >= 1 degrees of freedom, to about 1e-12.

    As a function of the angle x the density is 2 cos(x)^(degrees - 1) / B(1/2, degrees / 2); Gauss-Legendre quadrature.
    """
    integral = angle / 2 * float(_NODE_WEIGHTS @ np.cos(angle / 2 * (_NODES + 1)) ** (degrees - 1))
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) * 2 / math.sqrt(math.pi)
    return min(integral * scale, 1.0)


def _t_p_value(t: float, degrees: float) -> float:
    return 1 - _t_within(math.atan(abs(t) / math.sqrt(degrees)), degrees)


def _t_quantile(confidence: float, degrees: float) -> float:
    """The t for which P(|T| <= t) = confidence, by bisection over the angle."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, degrees) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of m p-values: the i-th smallest times (m - i + 1), made non-decreasing, at most 1.

    Source: Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    p_values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(np.maximum.accumulate(p_values[order] * np.arange(len(order), 0, -1)), 1.0)
    return adjusted.tolist()


def _cluster_sums(differences_Q: np.ndarray, clusters: Sequence[str] | None) -> tuple[np.ndarray, np.ndarray]:
    """Sum of differences and number of questions of each cluster, [C] float64 each."""
    differences_Q = np.asarray(differences_Q, dtype=np.float64)
    if differences_Q.ndim != 1 or len(differences_Q) == 0 or not np.isfinite(differences_Q).all():
        raise ValueError(f"differences of shape {differences_Q.shape}: expected finite numbers, one per question")
    if clusters is None:
        return differences_Q, np.ones_like(differences_Q)
    if len(clusters) != len(differences_Q):
        raise ValueError(f"{len(clusters)} cluster ids for {len(differences_Q)} questions")
    _, cluster_Q = np.unique(np.asarray(clusters), return_inverse=True)
    return np.bincount(cluster_Q, weights=differences_Q), np.bincount(cluster_Q).astype(np.float64)


def _blocks(num_samples: int, num_clusters: int, block_values: int) -> Iterator[int]:
    """Block sizes that add up to `num_samples`."""
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}, expected at least 1")
    rows = max(1, block_values // num_clusters)
    for start in range(0, num_samples, rows):
        yield min(rows, num_samples - start)
