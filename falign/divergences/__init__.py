"""f-divergences between a policy and its reference, and estimators of their values and gradients."""

from falign.divergences import estimators
from falign.divergences.alpha import Alpha, SquaredHellinger
from falign.divergences.base import Divergence, Standardized
from falign.divergences.bounded import LeCam, TotalVariation
from falign.divergences.chi_squared import Chi2KL, Chi2KLDual, NeymanChi2, PearsonChi2
from falign.divergences.generator import GeneratorDivergence, from_generator
from falign.divergences.jensen_shannon import GeneralizedJS, JensenShannon
from falign.divergences.kullback_leibler import ForwardKL, Jeffreys, ReverseKL
from falign.divergences.optimal import optimal_weights
from falign.divergences.registry import get, names, resolve

__all__ = [
    "Alpha",
    "Chi2KL",
    "Chi2KLDual",
    "Divergence",
    "ForwardKL",
    "GeneralizedJS",
    "GeneratorDivergence",
    "Jeffreys",
    "JensenShannon",
    "LeCam",
    "NeymanChi2",
    "PearsonChi2",
    "ReverseKL",
    "SquaredHellinger",
    "Standardized",
    "TotalVariation",
    "estimators",
    "from_generator",
    "get",
    "names",
    "optimal_weights",
    "resolve",
]
