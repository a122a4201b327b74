"""The generators of the documentation's table in 60-digit arithmetic: the textbook formulas, not falign's."""

from __future__ import annotations

from mpmath import log, mp, mpf, sqrt

mp.dps = 60

A, B = mpf("0.3"), mpf("0.2")


def alpha(a):
    a = mpf(a)
    return (
        lambda u: (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1)),
        lambda u: (1 - u**-a) / a,
    )


def generalized_js(b):
    b = mpf(b)
    return (
        lambda u: b * u * log(u / (b * u + 1 - b)) - (1 - b) * log(b * u + 1 - b),
        lambda u: b * log(u / (b * u + 1 - b)),
    )


# name -> (f, f'), of an exact u.
EXACT = {
    "reverse_kl": (lambda u: u * log(u) - u + 1, log),
    "forward_kl": (lambda u: -log(u) + u - 1, lambda u: 1 - 1 / u),
    "jensen_shannon": (lambda u: u * log(u) - (u + 1) * log((u + 1) / 2), lambda u: log(2 * u / (1 + u))),
    "jeffreys": (lambda u: (u - 1) * log(u), lambda u: log(u) + 1 - 1 / u),
    "squared_hellinger": (lambda u: (sqrt(u) - 1) ** 2, lambda u: 1 - 1 / sqrt(u)),
    "pearson_chi2": (lambda u: (u - 1) ** 2, lambda u: 2 * (u - 1)),
    "neyman_chi2": (lambda u: (1 - u) ** 2 / u, lambda u: 1 - u**-2),
    "chi2_kl": (lambda u: (u - 1) ** 2 / 2 + u * log(u) - u + 1, lambda u: u - 1 + log(u)),
    "total_variation": (lambda u: abs(u - 1) / 2, lambda u: mpf((u > 1) - (u < 1)) / 2),
    "le_cam": (lambda u: (u - 1) ** 2 / (u + 1), lambda u: (u - 1) * (u + 3) / (u + 1) ** 2),
    "generalized_js(0.2)": generalized_js(0.2),
    "generalized_js(0.9)": generalized_js(0.9),
    **{f"generalized_js({b!r})": generalized_js(b) for b in (0.999, 0.001, 1e-6, 1 - 1e-6, 1e-12, 1 - 1e-12)},
    "alpha(0.3)": alpha(0.3),
    "alpha(0.5)": alpha(0.5),
    "alpha(0.7)": alpha(0.7),
    "alpha(1e-06)": alpha(1e-06),
    "alpha(0.999999)": alpha(0.999999),
    "alpha(-1.0)": alpha(-1.0),
    "alpha(-0.4)": alpha(-0.4),
    "alpha(1.7)": alpha(1.7),
    "dual(chi2_kl)": (
        lambda u: (1 - u) ** 2 / u / 2 - log(u) + u - 1,
        lambda u: (1 - u**-2) / 2 + 1 - 1 / u,
    ),
}
