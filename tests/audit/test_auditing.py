"""What the audit gives a loss, what it makes of the answer, and its command."""

import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import falign
from falign import divergences
from falign.audit.comparison import sum_of_two
from falign.audit.samples import MeanGradient
from falign.audit.truth import LEVELS, registry, true_gradient, true_value
from falign.audit.world import COMPLETIONS, MASK, PREFIXES, worlds
from falign.cli.main import app
from falign.divergences.estimators import loss_from_reference
from falign.objectives import Distillation, Hybrid, Pairwise, PolicyGradient, Rehearsal, Sum, TopK
from falign.objectives.schedules import Linear, Scheduled
from tests.audit import own_losses

OWN = "tests.audit.own_losses"


def test_the_world_is_small_and_its_laws_are_laws():
    assert len(COMPLETIONS) == 40
    assert len(PREFIXES) == 13
    for world in worlds():
        for model in ("policy", "reference", "old"):
            law = world.law(model)
            assert law.sum().item() == pytest.approx(1, abs=1e-12)
            assert law.max() > 1.5 * law.min()
            tokens = (law[:, None] * MASK).sum().item()
            assert world.visits(model).sum().item() == pytest.approx(tokens, abs=1e-12)


@pytest.mark.parametrize("level", LEVELS)
def test_the_true_gradient_is_that_of_a_difference_quotient(level):
    world = worlds()[2]
    for divergence in registry():
        gradient = true_gradient(divergence, world, level)
        direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        values, step = [], 1e-6
        for sign in (1, -1):
            moved = type(world)((world.policy.detach() + sign * step * direction).requires_grad_(), world.fixed)
            if level == "token":  # the prefixes are those of the policy that was left
                table, own = moved.table("policy"), world.table("reference")
                at_prefix = (own.exp() * divergence.f(table - own)).sum(dim=-1)
                values.append((world.visits("policy").detach() * at_prefix).sum())
            else:
                values.append(true_value(divergence, moved, level))
        quotient = ((values[0] - values[1]) / (2 * step)).item()
        assert (gradient * direction).sum().item() == pytest.approx(quotient, rel=1e-6, abs=1e-8), divergence.name


@pytest.mark.parametrize("name", [each.name for each in registry()])
@pytest.mark.parametrize("samples", ["policy", "old"])
def test_every_divergence_is_recognized_and_told_from_all_others(name, samples):
    """As a penalty by token, as one of whole completions, and as rehearsal."""
    divergence = divergences.get(name)
    for level in ("sequence", "token"):
        result = falign.audit(PolicyGradient(divergence, 0.7, level=level), name, samples=samples)
        assert result.passed
        assert result.best.level == level
        assert result.best.ratio == pytest.approx(0.7, rel=1e-9)
        same = {row.divergence for row in result.table if row.exact}
        assert same <= {
            name,
            *({"alpha(0.5)", "squared_hellinger"} if name in ("alpha(0.5)", "squared_hellinger") else {}),
        }
    if samples == "policy":
        rehearsed = falign.audit(Rehearsal(divergence, "sequence"), name, samples="reference")
        assert rehearsed.best.exact
        assert rehearsed.best.ratio == pytest.approx(1, rel=1e-9)


def test_a_loss_that_is_right_to_first_order_does_not_pass():
    near = falign.audit(f"{OWN}:first_order", "reverse_kl")
    assert near.finding == "none"
    assert near.passed is False
    assert 0.8 < near.row("reverse_kl", "token").cosine < 1 - 1e-4
    assert falign.audit(f"{OWN}:k2", "reverse_kl").passed


def test_a_direction_with_another_strength_at_every_policy_is_no_gradient():
    def with_strength(logprobs, reference_logprobs, vocabulary_logprobs):
        strength = vocabulary_logprobs[:, :1].detach().exp().square().sum(dim=-1)  # of the first token's distribution
        return strength * (logprobs - reference_logprobs).square()

    result = falign.audit(with_strength, "reverse_kl")
    assert result.finding == "direction"
    assert result.passed is False
    assert "with a strength that depends on the policy" in result.verdict


def test_the_opposite_is_told():
    def bonus(logprobs, reference_logprobs):
        return -(logprobs - reference_logprobs).square() / 2

    result = falign.audit(bonus)
    assert result.finding == "opposite"
    assert result.verdict == (
        "On samples of the policy, what bonus minimizes has the opposite of the gradient of the reverse KL by token on "
        "fixed prefixes (cosine −1.000): it pushes the policy away from the reference."
    )


def test_only_what_is_asked_for_is_given():
    falign.audit(own_losses.k2)
    assert set(own_losses.SEEN) == {"logprobs", "reference_logprobs"}

    def all_of_it(logprobs, old_logprobs, rewards, tokens, completion_mask, teacher_logprobs, scale=2.0):
        assert torch.equal(old_logprobs, logprobs.detach())
        assert not rewards.any()
        assert tokens.shape == completion_mask.shape == teacher_logprobs.shape
        return scale * (logprobs - teacher_logprobs).square() / 2

    result = falign.audit(all_of_it)
    assert result.best.reference == "teacher"
    assert result.best.ratio == pytest.approx(2, rel=1e-9)
    assert "of the reverse KL to the teacher by token" in result.verdict


def test_means_and_sums_of_a_batch_are_enumerated_too():
    def mean_over_rows(logprobs, reference_logprobs):
        return own_losses.k2(logprobs, reference_logprobs).sum(dim=-1).mean()

    def mean_over_tokens(logprobs, reference_logprobs, mask):
        return own_losses.k2(logprobs, reference_logprobs).sum() / mask.sum()

    def sum_over_rows(logprobs, reference_logprobs):
        return own_losses.k2(logprobs, reference_logprobs).sum()

    for loss in (mean_over_rows, sum_over_rows):
        assert falign.audit(loss).best.ratio == pytest.approx(1, rel=1e-9)
    by_token = falign.audit(mean_over_tokens)
    assert by_token.finding == "direction"  # 1 over the mean length, which is the policy's
    assert falign.audit(mean_over_tokens, samples="reference").finding == "none"


def test_another_source_of_samples_is_hinted_at():
    result = falign.audit(Rehearsal(divergences.get("jensen_shannon"), "sequence"))
    assert result.finding == "none"
    assert result.notes[-1] == (
        "With samples='reference' it has the gradient of the Jensen–Shannon divergence of whole completions (ratio 1)."
    )
    assert not falign.audit(Rehearsal(divergences.get("jensen_shannon"), "sequence"), samples="policy").notes


def test_a_loss_of_rewards_alone_is_said_to_have_been_given_equal_ones():
    result = falign.audit(PolicyGradient())
    assert result.finding == "zero"
    assert "equal rewards" in result.notes[0]


def test_a_measure_of_fewer_tokens_is_not_that_of_all():
    teacher = {"reduction": "sequence_sum"}
    kl = divergences.get("forward_kl")
    assert falign.audit(Distillation(TopK(kl, k=4, reference="teacher"), **teacher), "forward_kl").passed
    assert falign.audit(Distillation(TopK(kl, k=2, reference="teacher"), **teacher), "forward_kl").finding == "none"


def test_an_own_divergence_is_compared_with():
    mine = divergences.from_generator(lambda u: u * u.log() - u + 1, name="mine")

    def rehearsal(logprobs, reference_logprobs):
        return loss_from_reference(mine, logprobs - reference_logprobs)

    result = falign.audit(rehearsal, mine, samples="reference", level="sequence")
    assert result.passed
    assert result.best.divergence == "mine"
    assert any("the reverse KL of whole completions (ratio 1)" in note for note in result.notes)


def test_schedules_stand_at_their_first_step():
    growing = Scheduled(PolicyGradient(divergences.get("le_cam"), 0.1), {"beta": Linear(0.3, 0.9, 10)})
    assert falign.audit(growing, "le_cam").best.ratio == pytest.approx(0.3, rel=1e-9)


def test_the_divergences_of_an_objective_are_compared_with():
    inner = PolicyGradient(divergences.get("alpha(-1.3)"), 0.2)
    for objective in (
        inner,
        Sum({"penalty": (inner, 2.0)}),
        Pairwise(divergences.get("generalized_js(0.7)"), beta=0.1),
    ):
        assert falign.audit(objective).finding == "exact"
    assert falign.audit(inner).best.divergence == "alpha(-1.3)"


def test_a_hybrid_is_the_sum_of_its_parts():
    hybrid = Hybrid(
        PolicyGradient(divergences.get("reverse_kl"), 0.3, level="token", credit="returns"),
        Rehearsal(divergences.get("reverse_kl"), "sequence"),
        0.5,
    )
    result = falign.audit(hybrid, "reverse_kl")
    assert result.best.ratio == pytest.approx(0.8, rel=1e-9)  # the reverse KL decomposes over tokens
    assert result.best.level == "sequence"


def test_two_divergences_are_found_in_a_sum_and_not_in_another_gradient():
    every, known = worlds(), registry()
    js, kl = divergences.get("jensen_shannon"), divergences.get("forward_kl")
    mixed = [0.3 * true_gradient(js, world, "token") - 2 * true_gradient(kl, world, "token") for world in every]
    found = sum_of_two([MeanGradient(each, 1.0) for each in mixed], every, known, "token")
    assert {(round(factor, 9), name) for factor, name in found} == {(0.3, "jensen_shannon"), (-2.0, "forward_kl")}
    assert sum_of_two([MeanGradient(each, 1.0) for each in mixed], every, known, "sequence") is None


def test_the_plot_shows_every_divergence_at_every_level(tmp_path):
    result = falign.audit("kl:k3_loss")
    assert len(result.table) == len(registry()) * 4
    path = result.plot(tmp_path / "k3.svg")
    svg = path.read_text()
    assert svg.count("<use") > 50
    assert result.plot(str(tmp_path / "k3.png")).read_bytes()[:4] == b"\x89PNG"


def run(*arguments):
    result = CliRunner().invoke(app, ["audit", *arguments], standalone_mode=False)
    return result


def test_the_command_prints_the_table_and_the_verdict_and_has_a_status(tmp_path):
    found = run("kl:k3_loss", "--divergence", "reverse_kl", "--plot", str(tmp_path / "k3.png"))
    assert found.return_value == 1
    assert "not of the reverse KL (0.913)." in found.output
    assert "pearson_chi2" in found.output
    assert (tmp_path / "k3.png").is_file()
    assert run("kl:k3_loss", "--divergence", "forward_kl").return_value is None
    assert "trl:fdpo_forward_kl" in run("--list").output
    whole = run("kl:k3_loss", "--level", "sequence", "--samples", "policy")
    assert "the forward KL of whole completions" in whole.output


def test_a_loss_in_a_file_of_the_current_folder_is_found(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def loss(logprobs, reference_logprobs):\n    return logprobs - reference_logprobs\n"
    )
    command = [sys.executable, "-m", "falign", "audit", "mine:loss", "--use", "reward", "--divergence", "reverse_kl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "mine:loss minimizes has the gradient of the reverse KL of whole completions" in done.stdout
