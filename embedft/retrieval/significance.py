"""Is a difference real? A paired bootstrap interval, a paired permutation test and Holm's correction; NumPy alone.

Questions are not independent when they share a document (synthetic data has two a chunk): a model that embeds the
document well answers both. Such questions form a cluster, and clusters, not questions, are resampled and sign-flipped.

    generator = np.random.default_rng(0)
    low, high = paired_bootstrap_interval(differences_Q, clusters, generator=generator)
    p_value = sign_flip_p_value(differences_Q, clusters, generator=generator)

Shapes: Q questions, C clusters, B random samples of one block.
"""

from collections.abc import Iterator, Sequence

import numpy as np

# Random values held at once, in all blocks of samples together: bounds memory (a few tens of MB) and fits the cache.
BLOCK_VALUES = 1 << 20


def paired_bootstrap_interval(
    differences_Q: np.ndarray,
    clusters: Sequence[str] | None = None,
    *,
    generator: np.random.Generator,
    num_samples: int = 10_000,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean difference, clusters drawn with replacement.

    Each sample draws C clusters and has the mean (sum of the differences in them) / (number of questions in them);
    the interval runs between the (1 - confidence) / 2 quantiles at either end. With few clusters it is too narrow,
    and with one it is a point.

    Args:
        differences_Q: [Q] per-question differences between two systems on the same questions.
        clusters: Q cluster ids; None: every question on its own.

    Source: Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13; Sakai, "Evaluating evaluation
    metrics based on the bootstrap", SIGIR 2006. Clusters: Field & Welsh, "Bootstrapping clustered data", JRSS B 2007.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    sums_C, sizes_C = _cluster_sums(differences_Q, clusters)
    means = []
    for num_rows in _blocks(num_samples, len(sums_C)):
        drawn_BC = generator.integers(0, len(sums_C), size=(num_rows, len(sums_C)))
        means.append(sums_C[drawn_BC].sum(axis=1) / sizes_C[drawn_BC].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


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
    least = abs(total) - 1e-12 * np.abs(sums_C).sum()
    hits = 0
    for num_rows in _blocks(num_samples, len(sums_C)):
        random_bytes = generator.integers(0, 256, size=(num_rows, -(-len(sums_C) // 8)), dtype=np.uint8)
        kept_BC = np.unpackbits(random_bytes, axis=1, count=len(sums_C))
        flipped_total_B = 2 * (kept_BC @ sums_C) - total  # sum of +s where the bit is 1 and -s where it is 0
        hits += int((np.abs(flipped_total_B) >= least).sum())
    return (1 + hits) / (1 + num_samples)


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


def _blocks(num_samples: int, num_clusters: int) -> Iterator[int]:
    """The sizes of blocks that add up to `num_samples`."""
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, not {num_samples}")
    rows = max(1, BLOCK_VALUES // num_clusters)
    for start in range(0, num_samples, rows):
        yield min(rows, num_samples - start)
