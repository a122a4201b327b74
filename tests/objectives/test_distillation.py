import pytest

from falign import divergences
from falign.objectives import DifficultyKernel, Distillation, DivergenceTo, Entropy

KL = divergences.get("forward_kl")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(divergence=Entropy(), reference="teacher"), "a measure, which names its own"),
        (dict(divergence=Entropy(), level="token"), "whole next-token distributions; set level='vocabulary'"),
        (dict(divergence=Entropy(), temperature=2.0), "temperature=2.0 with a measure"),
        (dict(divergence=KL, level="token", temperature=2.0), r"temperature=2.0 at level='token'"),
        (dict(divergence=KL, temperature=0.0), "positive and finite"),
        (dict(divergence=KL, level="sequence", reduction="token_mean"), "not a sum over tokens"),
        (dict(divergence=KL, level="sequence", credit="returns"), "no later prefixes"),
        (dict(divergence=KL, level="sequence", importance="token"), "whole prefixes are weighted"),
        (dict(divergence=KL, level="sequence", weights=[DifficultyKernel()]), "divergence at single prefixes"),
        (dict(divergence=KL, credit="returns", weights=[DifficultyKernel()]), "divergence at single prefixes"),
        (dict(divergence=KL, credit="returns", importance="token"), "whole prefixes are weighted"),
    ],
)
def test_settings_that_have_no_effect_or_no_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Distillation(**settings)


def test_what_it_reads_says_where_its_completions_may_come_from():
    assert Distillation(KL).needs == frozenset()
    assert Distillation(KL).measures == {"divergence": DivergenceTo(KL, "teacher")}
    assert Distillation(KL, weights=[DifficultyKernel()]).needs == {"rewards"}
    assert Distillation(KL, credit="returns").needs == {"old_logprobs"}
    for level in ("token", "sequence"):
        assert Distillation(KL, "tutor", level).needs == {"references.tutor", "old_logprobs"}
        assert Distillation(KL, "tutor", level).measures == {}
    assert Distillation(Entropy()).reference is None
    assert Distillation(KL).learns_from_samples
    assert Distillation(KL, importance="token").correction_level == "token"
