"""Student's t distribution: its two-sided p-value and quantile, in the standard library alone, to about 1e-14.

    p_value = t_p_value(2.1, 9)
    assert math.isclose(t_quantile(1 - p_value, 9), 2.1)

Deliberately not here: the test (significance.py).
"""

import math


def t_p_value(t: float, degrees: float) -> float:
    """P(|T| >= |t|) = I_x(degrees / 2, 1/2) at x = degrees / (degrees + t^2), I the regularised incomplete beta.

    Args:
        t: any number, infinite too.
        degrees: of freedom, above 0, not only whole ones.

    Source: DLMF 8.17; Abramowitz & Stegun, "Handbook of Mathematical Functions", 1964, 26.7.1.
    """
    if math.isinf(t):
        return 0.0
    a, square = degrees / 2, t * t
    # Both parts as quotients: 1 less the other would lose the digits of a t near 0.
    x, y = degrees / (degrees + square), square / (degrees + square)
    if y == 0:
        return 1.0
    log_front = a * -math.log1p(square / degrees) + 0.5 * math.log(y) + _log_gamma_step(a) - 0.5 * math.log(math.pi)
    if x < (a + 1) / (a + 2.5):
        return math.exp(log_front) * _beta_fraction(a, 0.5, x) / a
    return 1 - math.exp(log_front) * _beta_fraction(0.5, a, y) / 0.5


def t_quantile(confidence: float, degrees: float) -> float:
    """The t with P(|T| <= t) = confidence, in (0, 1), by bisection down to neighbouring floats."""
    low, high = 0.0, 1.0
    while t_p_value(high, degrees) > 1 - confidence:
        low, high = high, 2 * high
    while (middle := (low + high) / 2) not in (low, high):
        if t_p_value(middle, degrees) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def _log_gamma_step(a: float) -> float:
    """log Gamma(a + 1/2) - log Gamma(a), by its asymptotic series where the difference would lose digits."""
    if a < 30:
        return math.lgamma(a + 0.5) - math.lgamma(a)
    return 0.5 * math.log(a) - 1 / (8 * a) + 1 / (192 * a**3) - 1 / (640 * a**5) + 17 / (14336 * a**7)


def _beta_fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of the regularised incomplete beta function, by the modified Lentz method.

    I_x(a, b) = x^a (1 - x)^b / (a B(a, b)) times it; it converges fast for x < (a + 1) / (a + b + 2).

    Source: DLMF 8.17.22; Lentz, "Generating Bessel functions in Mie scattering calculations", 1976.
    """
    tiny = 1e-300  # instead of a 0 to divide by
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1) or tiny)
    value, m, change = d, 0, 0.0
    while abs(change - 1) > 1e-15:
        m += 1
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        change = 1.0
        for step in (even, odd):
            c, d = 1 + step / c or tiny, 1 / (1 + step * d or tiny)
            change *= c * d
        value *= change
    return value
