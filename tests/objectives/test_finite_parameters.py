"""No constructor takes a strength that is infinite or NaN."""

import math

import pytest
import torch

from falign import divergences
from falign.divergences import optimal_weights
from falign.objectives import (
    IPO,
    ExponentialReward,
    Hybrid,
    Listwise,
    MomentConstraints,
    Pairwise,
    PolicyGradient,
    Rehearsal,
    Robust,
    Supervised,
    TokenPairwise,
)
from falign.objectives.margins import Conservative, Exo
from falign.objectives.penalty import Surrogate

KL = divergences.get("reverse_kl")
CONSTRUCTORS = {
    "Pairwise.beta": lambda x: Pairwise(KL, beta=x),
    "Listwise.beta": lambda x: Listwise(KL, beta=x),
    "TokenPairwise.beta": lambda x: TokenPairwise(beta=x),
    "TokenPairwise.alpha": lambda x: TokenPairwise(alpha=x),
    "PolicyGradient.beta": lambda x: PolicyGradient(KL, x),
    "PolicyGradient.value_coefficient": lambda x: PolicyGradient(advantage="gae", value_coefficient=x),
    "PolicyGradient.gamma": lambda x: PolicyGradient(advantage="gae", gamma=x),
    "PolicyGradient.lam": lambda x: PolicyGradient(advantage="gae", lam=x),
    "Surrogate.clip_low": lambda x: Surrogate(clip_low=x),
    "Surrogate.clip_high": lambda x: Surrogate(clip_high=x),
    "Hybrid.coefficient": lambda x: Hybrid(PolicyGradient(), Rehearsal(KL), x),
    "Supervised.beta": lambda x: Supervised(KL, x),
    "ExponentialReward.beta": ExponentialReward,
    "MomentConstraints.lambdas": lambda x: MomentConstraints((1.0, x)),
    "IPO.beta": IPO,
    "Robust.label_noise": Robust,
    "Conservative.label_smoothing": Conservative,
    "Exo.label_smoothing": Exo,
    "Alpha": divergences.Alpha,
    "GeneralizedJS": divergences.GeneralizedJS,
    "optimal_weights.beta": lambda x: optimal_weights(torch.zeros(2), KL, x),
}


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_a_parameter_that_is_not_finite_is_refused(name, value):
    with pytest.raises(ValueError, match=r"inf|nan"):
        CONSTRUCTORS[name](value)
