import pytest
import torch

from falign import DPHRL, FDPG, FDPO, SALSA, SALSARLOO
from falign.divergences import get
from falign.errors import ConfigError
from falign.objectives import (
    BinaryConstraint,
    Distillation,
    DistributionMatching,
    ExponentialReward,
    MomentConstraints,
    PolicyGradient,
    ProductTarget,
    Rehearsal,
    Selected,
    Sum,
    Supervised,
)
from falign.runfile import parse_run
from falign.runfile.objective_config import OBJECTIVES

LEAST = {"output_dir": "run", "model": {"path": "m"}, "data": {"train": [{"path": "d"}]}}


def config(**fields):
    return parse_run({**LEAST, "objective": fields}).objective


SFT = {"kind": "supervised", "completions": "chosen"}
DPO = {"kind": "pairwise", "beta": 0.3}


def test_a_sum_of_sections_is_the_sum_of_what_they_build():
    teacher = {"kind": "distillation", "divergence": "js", "temperature": 2.0, "completions": "all"}
    found = config(kind="sum", terms={"dpo": DPO, "sft": SFT, "kd": teacher}, weights={"sft": 0.2, "kd": -3})
    assert found.build() == Sum(
        {
            "dpo": FDPO("reverse_kl", 0.3),
            "sft": (Selected(Supervised(), "chosen"), 0.2),
            "kd": (Selected(Distillation(get("js"), temperature=2.0), "all"), -3.0),
        }
    )
    assert found.learns_from_preferences
    assert not found.is_surrogate
    assert found.title.startswith("1 × reverse_kl, β = 0.3 + 0.2 × fine-tuning")
    fitted = {"kind": "distribution_matching", "target": {"kind": "moments", "moments": [0.5]}}
    both = config(kind="sum", terms={"fdpg": fitted, "kd": {"kind": "distillation", "measure": "entropy"}})
    assert both.needs_samples
    assert both.num_rewards == 1
    assert both.is_surrogate
    features = torch.tensor([[0.0], [1.0], [0.0]])
    (term,) = [each for name, (each, _) in both.build_on(features).terms.items() if name == "fdpg"]
    assert term == config(**fitted).build_on(features)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"terms": {"dpo": {"kind": "pairwise", "bata": 1}}},
            "objective.terms.dpo.bata.*did you mean objective.terms.dpo.beta",
        ),
        (
            {"terms": {"dpo": {"kind": "pairwize"}}},
            "objective.terms.dpo.kind='pairwize' is unknown: did you mean pairwise",
        ),
        ({"terms": {"dpo": {"beta": 1}}}, "objective.terms.dpo.kind is required"),
        ({"terms": {"a": {"kind": "sum", "terms": {"b": DPO}}}}, "objective.terms.a.kind='sum' is unknown"),
        (
            {"terms": {"dpo": {"kind": "pairwise", "divergence": "le_cam"}}},
            "^objective.terms.dpo: f-DPO has no closed form",
        ),
        ({"terms": {"dpo": {"kind": "pairwise", "divergence": "kl"}}}, "^objective.terms.dpo.divergence='kl'"),
        ({"terms": {"dpo": DPO, "sft": {"kind": "supervised"}}}, "term sft.*rejected.*completions='chosen'"),
        ({"terms": {"dpo": DPO}, "weights": {"spt": 1.0}}, "objective.weights.spt: the terms are dpo"),
        ({"terms": {"dpo": DPO}, "weights": {"dpo": 0.0}}, "weight 0.0"),
        (
            {"terms": {}},
            r"objective.terms=\{\}: give one objective or more, each by a name of your choice, as in \{dpo: ",
        ),
        ({"terms": {1: DPO, 2: SFT}}, "objective.terms=.*: 1 is not the name of a term: give each objective a name"),
        (
            {"terms": {"dpo": {"kind": "pairwise", "beta": {"from": 1.0, "to": -1.0, "steps": 4}}}},
            r"objective.terms.dpo.beta=0.0: Input should be greater than 0 \(its schedule has this value at step 2\)",
        ),
        ({"terms": {"1": DPO, "2": SFT}}, "terms has '1': a name is a lower-case letter"),
    ],
)
def test_sums_that_cannot_be_meant_are_refused_with_the_path_of_the_term(fields, message):
    with pytest.raises(ConfigError, match=message):
        config(kind="sum", **fields).build()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"divergence": "js", "measure": "entropy"}, "divergence=js beside objective.measure, which takes its place"),
        ({"measure": "entrpy"}, "objective.measure='entrpy'"),
        ({"measure": "entropy", "reference": "teacher"}, "a measure, which names its own"),
        ({"measure": "entropy", "temperature": 2.0}, "^objective: temperature=2.0 with a measure, which has its own"),
        ({"divergence": "js", "level": "token", "temperature": 2.0}, "objective: temperature=2.0 at level='token'"),
    ],
)
def test_distillation_without_effect_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        config(kind="distillation", **fields).build()


def test_every_built_in_objective_names_its_method_for_reports():
    methods = {kind: section.method for kind, section in OBJECTIVES.members.items() if kind != "python"}
    assert "" not in methods.values()
    assert len(set(methods.values())) == len(methods) > 7


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"kind": "policy_gradient"}, PolicyGradient()),
        (
            {
                "kind": "policy_gradient",
                "divergence": "reverse_kl",
                "beta": 0.1,
                "advantage": "gae",
                "clip_low": 0.2,
                "clip_high": 0.2,
                "importance": "token",
                "reduction": "token_mean",
            },
            SALSA(0.1),
        ),
        ({"kind": "policy_gradient", "divergence": "reverse_kl", "beta": 0.1}, SALSARLOO(0.1)),
        (
            {
                "kind": "policy_gradient",
                "divergence": "js",
                "beta": 0.3,
                "advantage": "gae",
                "level": "vocabulary",
                "credit": "returns",
                "reduction": "token_mean",
                "value_coefficient": 0.5,
                "gamma": 0.99,
                "lam": 0.9,
            },
            PolicyGradient(
                get("js"),
                0.3,
                "gae",
                level="vocabulary",
                credit="returns",
                reduction="token_mean",
                value_coefficient=0.5,
                gamma=0.99,
                lam=0.9,
            ),
        ),
        ({"kind": "hybrid"}, DPHRL()),
        (
            {"kind": "hybrid", "divergence": "forward_kl", "coefficient": 0.01, "clip_high": 0.3},
            DPHRL("forward_kl", 0.01, clip_high=0.3),
        ),
        ({"kind": "rehearsal", "divergence": "alpha(0.2)"}, Rehearsal(get("alpha(0.2)"))),
        (
            {"kind": "rehearsal", "level": "sequence", "reduction": "sequence_sum"},
            Rehearsal(get("js"), "sequence"),
        ),
        ({"kind": "supervised"}, Supervised()),
        (
            {"kind": "supervised", "divergence": "pearson_chi2", "beta": 0.2},
            Supervised(get("pearson_chi2"), 0.2),
        ),
        ({"kind": "distribution_matching", "target": {"kind": "binary"}}, FDPG("js", BinaryConstraint())),
        (
            {
                "kind": "distribution_matching",
                "divergence": "reverse_kl",
                "baseline": "constant",
                "target": {"kind": "exponential", "beta": 0.5},
            },
            FDPG("reverse_kl", ExponentialReward(0.5), baseline="constant"),
        ),
        (
            {
                "kind": "distribution_matching",
                "target": {
                    "kind": "product",
                    "targets": [{"kind": "binary"}, {"kind": "moments", "moments": [0.5], "lambdas": [1.5]}],
                },
            },
            FDPG("js", ProductTarget((BinaryConstraint(), MomentConstraints((1.5,))))),
        ),
    ],
)
def test_sections_are_the_objectives(fields, expected):
    section = config(**fields)
    assert section.build() == expected
    assert section.title


def test_moments_are_fitted_on_samples_of_the_reference():
    section = config(kind="distribution_matching", target={"kind": "moments", "moments": [0.5]})
    assert section.needs_samples
    section.unfitted().build()
    with pytest.raises(ConfigError, match="must be fitted on samples of the reference"):
        section.build()
    objective = section.build_on(torch.tensor([[0.0], [0.0], [0.0], [1.0]]))
    assert isinstance(objective, DistributionMatching)
    assert objective.target.lambdas[0] == pytest.approx(1.0986, abs=1e-4)
    with pytest.raises(ConfigError, match=r"objective.target: moments of feature 0 .* cannot be reached"):
        section.build_on(torch.zeros(4, 1))


def test_moments_of_a_product_are_the_products():
    """Fitted on samples that the other factors leave, and weighted by them."""
    section = config(
        kind="distribution_matching",
        target={
            "kind": "product",
            "targets": [
                {"kind": "moments", "moments": [0.4]},
                {"kind": "binary"},
                {"kind": "exponential", "beta": 2.0},
                {"kind": "moments", "moments": [0.7], "lambdas": [0.3]},
                {"kind": "moments", "moments": [0.1, -0.2]},
            ],
        },
    )
    assert section.target.num_features == 6
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 6, generator=generator, dtype=torch.float64)
    features[:, 1] = (features[:, 1] > 0).double()
    target = section.build_on(features).target
    weights = target.log_score(features).softmax(0)
    assert (weights[features[:, 1] == 0] == 0).all()
    means = weights @ features
    assert means[[0, 4, 5]].tolist() == pytest.approx([0.4, 0.1, -0.2], abs=1e-6)
    assert target.targets[3].lambdas == (0.3,)


def test_what_no_samples_could_make_right_is_refused_before_there_are_any():
    moments = {"kind": "moments", "moments": [0.5]}
    with pytest.raises(ConfigError, match="did you mean 'jensen_shannon'"):
        config(kind="distribution_matching", divergence="jensen_shanon", target=moments).unfitted().build()
    product = {"kind": "product", "targets": [moments, {"kind": "binary"}]}
    with pytest.raises(ConfigError, match=r"objective: reverse_kl cannot be used with a target that has zeros"):
        config(kind="distribution_matching", divergence="reverse_kl", target=product).unfitted().build()
    config(kind="distribution_matching", divergence="reverse_kl", target=moments).unfitted().build()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "policy_gradient", "beta": 0.1}, "objective: beta=0.1.* without a divergence"),
        ({"kind": "policy_gradient", "advantage": "rloo"}, "objective.advantage='rloo' is unknown"),
        ({"kind": "policy_gradient", "lam": 0.9}, "is only for advantage='gae'"),
        ({"kind": "supervised", "divergence": "js", "beta": 0.1}, r"objective: f-SFT is not defined under"),
        ({"kind": "supervised", "beta": 0.1}, "give both, or neither"),
        ({"kind": "rehearsal", "level": "sequence", "reduction": "token_mean"}, "not a sum over tokens"),
        (
            {"kind": "distribution_matching", "target": {"kind": "moments", "moments": [1], "lambdas": [1, 2]}},
            "2 lambdas for 1 moments",
        ),
    ],
)
def test_what_theory_does_not_allow_is_refused_with_the_reason(fields, message):
    with pytest.raises(ConfigError, match=message):
        config(**fields).build()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "policy_gradiant"}, r"objective.kind='policy_gradiant' is unknown: did you mean policy_gradient\?"),
        ({"kind": "kto"}, r"objective.kind='kto' is unknown: for this method set unpaired \(docs/methods.md .* Choose"),
        (
            {"kind": "policy_gradient", "weights": ["dad"]},
            r"objective.weights.0.kind='dad' is unknown: did you mean dads\? Choose one of "
            "difficulty_kernel, dads",
        ),
        ({"kind": "GRPO"}, "for this method set policy_gradient"),
        ({"kind": "distribution_matching"}, "objective.target is required"),
        ({"kind": "distribution_matching", "target": "binary"}, r"as in `objective.target: \{kind: ...\}`"),
        ({"kind": "distribution_matching", "target": {}}, "objective.target.kind is required: choose one of binary, "),
        (
            {"kind": "distribution_matching", "target": {"kind": "binery"}},
            r"objective.target.kind='binery' is unknown: did you mean binary\? Choose one of binary, moments,",
        ),
        (
            {"kind": "distribution_matching", "target": {"kind": "moments", "moment": [1.0]}},
            r"unknown key 'objective.target.moment': did you mean objective.target.moments\?",
        ),
        (
            {"kind": "distribution_matching", "target": {"kind": "binary", "beta": 1.0}},
            "objective.target.kind=binary has no such field, kind=exponential has",
        ),
        (
            {"kind": "distribution_matching", "target": {"kind": "product", "targets": [{"kind": "expo", "beta": 1}]}},
            "objective.target.targets.0.kind='expo' is unknown",
        ),
        (
            {
                "kind": "distribution_matching",
                "target": {"kind": "product", "targets": [{"kind": "binary"}, {"kind": "exponential", "beta": 0}]},
            },
            "objective.target.targets.1.beta=0: Input should be greater than 0",
        ),
        ({"kind": "hybrid", "clip_low": 2}, "objective.clip_low=2: Input should be less than or equal to 1"),
    ],
)
def test_mistakes_are_named_with_their_path(fields, message):
    with pytest.raises(ConfigError, match=message):
        config(**fields)
