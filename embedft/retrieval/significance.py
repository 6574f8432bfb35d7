"""Significance of differences: paired bootstrap intervals, permutation tests, intervals over seeds and questions, Holm.

    low, high = paired_bootstrap_interval(differences_Q, clusters, generator=np.random.default_rng(0))
    p_value = sign_flip_p_value(differences_Q, clusters, generator=np.random.default_rng(0))
    recipe = recipe_interval(differences_SQ, clusters)       # a row per training seed

Questions that share a document are not independent evidence: a model that embeds it well answers all of them. So they
form a cluster, and whole clusters are resampled or flipped.

Shapes: Q questions, C clusters, S seeds, B random samples of one block.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ROUNDING = 1e-12  # smaller differences are rounding errors: the same values summed in another order
Clusters = Sequence[str] | None  # the cluster of each question; None: each is its own
_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(64)


def paired_bootstrap_interval(
    differences_Q: np.ndarray, clusters: Clusters = None, *, generator: np.random.Generator, num_samples: int = 10_000
) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean difference, with whole clusters drawn with replacement.

    A sample's mean is over all questions in its C clusters. With few clusters the interval is too narrow.

    Source: Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13; Sakai, "Evaluating evaluation
    metrics based on the bootstrap", SIGIR 2006; Field & Welsh, "Bootstrapping clustered data", JRSS B 2007."""
    sums_C, sizes_C = _cluster_sums(differences_Q, clusters)
    num_clusters, one_size = len(sums_C), (sizes_C == sizes_C[0]).all()
    means = []
    for num_rows in _blocks(num_samples, num_clusters):
        drawn_BC = generator.integers(0, num_clusters, size=(num_rows, num_clusters))
        # "clip" skips the bounds check.
        num_questions = sizes_C.sum() if one_size else sizes_C.take(drawn_BC, mode="clip").sum(axis=1)
        means.append(sums_C.take(drawn_BC, mode="clip").sum(axis=1) / num_questions)
    return tuple(np.quantile(np.concatenate(means), [(1 - 0.95) / 2, (1 + 0.95) / 2]).tolist())


def sign_flip_p_value(
    differences_Q: np.ndarray, clusters: Clusters = None, *, generator: np.random.Generator, num_samples: int = 10_000
) -> float:
    """Two-sided p-value of a paired permutation test: under the null hypothesis the two systems can be swapped, which
    flips the signs of all differences in a cluster.

    p = (1 + hits) / (1 + num_samples), where a hit is a sample whose |mean| is at least the observed one.

    Source: Smucker, Allan & Carterette, "A comparison of statistical significance tests for information retrieval
    evaluation", CIKM 2007; the added 1: Phipson & Smyth, "Permutation p-values should never be zero", 2010."""
    sums_C, _ = _cluster_sums(differences_Q, clusters)
    total = sums_C.sum()
    # Sums of the same numbers in another order may differ by rounding, and exact ties must count as hits.
    least = abs(total) - ROUNDING * np.abs(sums_C).sum()
    hits = 0
    for num_rows in _blocks(num_samples, len(sums_C)):
        random_bytes = generator.integers(0, 256, size=(num_rows, -(-len(sums_C) // 8)), dtype=np.uint8)
        kept_BC = np.unpackbits(random_bytes, axis=1, count=len(sums_C))
        flipped_total_B = 2 * (kept_BC @ sums_C) - total  # sum of +s where the bit is 1 and -s where it is 0
        hits += int((np.abs(flipped_total_B) >= least).sum())
    return (1 + hits) / (1 + num_samples)


@dataclass(frozen=True)
class Variance:
    """What the mean difference of a recipe from a base varies with: seeds, questions, and the two together."""

    mean: float  # over questions, then test sets, then seeds
    seeds: float  # V_S of `recipe_interval`; 0 for one seed
    questions: float  # V_C
    noise: float  # V_SC; 0 for one seed
    num_seeds: int
    num_clusters: int  # of all test sets
    num_queries: int
    num_sets: int = 1

    @property
    def total(self) -> float:
        """V of `recipe_interval`."""
        return self.seeds + self._more

    @property
    def _more(self) -> float:
        return max(self.questions - min(self.noise, self.seeds), 0.0)

    @property
    def degrees(self) -> float:
        """Degrees of freedom of `total`, by Satterthwaite."""
        by_seeds = self.seeds**2 / (self.num_seeds - 1) if self.num_seeds > 1 else 0.0
        spread = by_seeds + self._more**2 / (self.num_clusters - self.num_sets)
        return self.total**2 / spread if spread > 0 else float(max(self.num_seeds - 1, 1))

    def at(self, factor: float) -> "Variance":
        """The same for `factor` times as many questions and clusters: the variance of the seeds themselves stays."""
        floor = max(self.seeds - self.noise, 0.0)
        parts = {"seeds": floor + min(self.seeds, self.noise) / factor, "noise": self.noise / factor}
        counts = {name: getattr(self, name) * factor for name in ("num_clusters", "num_queries")}
        return dataclasses.replace(self, questions=self.questions / factor, **parts, **counts)


def variance_of(*test_sets: tuple[np.ndarray, Clusters]) -> Variance:
    """The variance of a mean difference, [S, Q] for each test set, with its clusters; formulas: `recipe_interval`.
    Over several test sets, it is that of the average of their means, whose questions are independent: with T test sets,
    V_C and V_SC are their sums divided by T^2. One seed is enough here, and then has no variance."""
    parts = [_variance_of(differences_SQ, clusters) for differences_SQ, clusters in test_sets]
    number, num_seeds = len(parts), parts[0][0].num_seeds
    means_S = np.mean([means_S for _, means_S in parts], axis=0)
    by_seed = float(means_S.var(ddof=1)) / num_seeds if num_seeds > 1 else 0.0
    totals = {name: sum(getattr(part, name) for part, _ in parts) for name in ("num_clusters", "num_queries")}
    errors = {name: sum(getattr(part, name) for part, _ in parts) / number**2 for name in ("questions", "noise")}
    return Variance(float(means_S.mean()), by_seed, num_seeds=num_seeds, num_sets=number, **errors, **totals)


def _variance_of(differences_SQ: np.ndarray, clusters: Clusters) -> tuple[Variance, np.ndarray]:
    """The variance of one test set, and the mean of each seed."""
    rows, sizes = zip(*(_cluster_sums(row, clusters) for row in differences_SQ), strict=True)
    sums_SC, sizes_C = np.stack(rows), sizes[0]
    (num_seeds, num_clusters), num_queries = sums_SC.shape, np.shape(differences_SQ)[1]
    if num_clusters < 2:
        raise ValueError("found 1 cluster of questions, expected at least 2")
    seed_means_S = sums_SC.sum(axis=1) / num_queries
    mean = float(seed_means_S.mean())
    centred_SC = sums_SC - sizes_C * mean
    by_question = num_clusters / (num_clusters - 1) * float((centred_SC.mean(axis=0) ** 2).sum()) / num_queries**2
    by_seed = by_noise = 0.0
    if num_seeds > 1:
        by_seed = float(seed_means_S.var(ddof=1)) / num_seeds
        noise_SC = sums_SC - sums_SC.mean(axis=0) - sizes_C * (seed_means_S - mean)[:, None]
        cells = num_seeds * num_clusters / ((num_seeds - 1) * (num_clusters - 1))
        by_noise = cells * float((noise_SC**2).sum()) / (num_seeds * num_queries) ** 2
    return Variance(mean, by_seed, by_question, by_noise, num_seeds, num_clusters, num_queries), seed_means_S


def t_interval(variance: Variance) -> dict[str, Any]:
    """The 95% interval, two-sided p_value, question_error and seed_error of `recipe_interval`."""
    mean, error, degrees = variance.mean, math.sqrt(variance.total), variance.degrees
    reach = t_quantile(0.95, degrees) * error
    p_value = _t_p_value(mean / error, degrees) if error > 0 else float(mean == 0)
    errors = {"question_error": math.sqrt(variance.questions), "seed_error": math.sqrt(variance.seeds)}
    return {"interval": (mean - reach, mean + reach), "p_value": p_value, **errors}


def recipe_interval(differences_SQ: np.ndarray, clusters: Clusters = None) -> dict[str, Any]:
    """95% interval of a training recipe's mean difference from a base, for new seeds and questions; S is at least 2.

    Returns interval, the two-sided p_value, and two standard errors: question_error for new questions with these seeds,
    seed_error for new seeds on these questions.

    Seeds and clusters of questions are crossed random effects. With m the overall mean, m_s that of seed s, n_c the
    questions of cluster c, and r_cs the sum of its differences under seed s minus n_c m:

        seeds       V_S = sum over s of (m_s - m)^2 / (S (S - 1))
        questions   V_C = C / (C - 1) * sum over c of (mean over s of r_cs)^2 / Q^2
        noise       V_SC = S C / ((S - 1) (C - 1)) * sum over c, s of (r_cs - mean over s - n_c (m_s - m))^2 / (S Q)^2
        both        V = V_S + max(V_C - min(V_SC, V_S), 0)

    V_S and V_C both contain the noise, so it is subtracted once. The interval is m +- t sqrt(V) with
    V^2 / (V_S^2 / (S - 1) + (V - V_S)^2 / (C - 1)) degrees of freedom. A bootstrap of three seeds is far too narrow.

    Source: Hillis, "A comparison of denominator degrees of freedom methods for multiple observer ROC analysis", 2007
    (readers are seeds, cases are questions); Satterthwaite, "An approximate distribution of estimates of variance
    components", 1946; clusters: Cameron, Gelbach & Miller, "Robust inference with multiway clustering", 2011."""
    shape = np.shape(differences_SQ)
    if len(shape) != 2 or shape[0] < 2:
        raise ValueError(f"found differences of shape {shape}, expected a row for each of 2 or more seeds")
    return t_interval(variance_of((differences_SQ, clusters)))


def _t_within(angle: float, degrees: float) -> float:
    """P(|T| <= sqrt(degrees) tan(angle)) for Student's t with `degrees` >= 1 degrees of freedom, to about 1e-12.
    In the angle x, the density is 2 cos(x)^(degrees - 1) / B(1/2, degrees / 2); by Gauss-Legendre quadrature."""
    integral = angle / 2 * float(_NODE_WEIGHTS @ np.cos(angle / 2 * (_NODES + 1)) ** (degrees - 1))
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) * 2 / math.sqrt(math.pi)
    return min(integral * scale, 1.0)


def _t_p_value(t: float, degrees: float) -> float:
    return 1 - _t_within(math.atan(abs(t) / math.sqrt(degrees)), degrees)


def t_quantile(confidence: float, degrees: float) -> float:
    """The t for which P(|T| <= t) = confidence, by bisection over the angle."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, degrees) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of m p-values: the i-th smallest times (m - i + 1), made non-decreasing, at most 1.
    Source: Holm, "A simple sequentially rejective multiple test procedure", 1979."""
    p_values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(np.maximum.accumulate(p_values[order] * np.arange(len(order), 0, -1)), 1.0)
    return adjusted.tolist()


def _cluster_sums(differences_Q: np.ndarray, clusters: Clusters) -> tuple[np.ndarray, np.ndarray]:
    """Sum of differences and number of questions of each cluster, [C] float64 each."""
    differences_Q = np.asarray(differences_Q, dtype=np.float64)
    if differences_Q.ndim != 1 or len(differences_Q) == 0 or not np.isfinite(differences_Q).all():
        raise ValueError(f"differences of shape {differences_Q.shape}: expected finite numbers, one per question")
    if clusters is None:
        return differences_Q, np.ones_like(differences_Q)
    _, cluster_Q = np.unique(np.asarray(clusters), return_inverse=True)
    return np.bincount(cluster_Q, weights=differences_Q), np.bincount(cluster_Q).astype(np.float64)


def _blocks(num_samples: int, num_clusters: int, block_values: int = 1 << 20) -> Iterator[int]:
    """Numbers of samples that add up to `num_samples`, with at most `block_values` values each."""
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}, expected at least 1")
    rows = max(1, block_values // num_clusters)
    for start in range(0, num_samples, rows):
        yield min(rows, num_samples - start)
