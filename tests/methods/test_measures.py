"""Each method's loss and gradient, on whole logits in float64 and by the formulas of its paper."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import falign.methods as methods
from falign.objectives import CompletionBatch
from falign.runfile import load_run_file
from falign.scoring import Distribution, Head, token_scores

N, T, H, V = 3, 4, 6, 9
MASK = torch.tensor([[True] * n + [False] * (T - n) for n in (4, 1, 3)])


class World:
    """Logits of a student and a teacher at the tokens of three completions, and the layers that they come from."""

    def __init__(self, *, trained_head):
        generator = torch.Generator().manual_seed(0)
        self.student, self.teacher = (torch.nn.Linear(H, V, bias=False, dtype=torch.float64) for _ in range(2))
        for layer in (self.student, self.teacher):
            layer.weight.data = torch.randn(V, H, generator=generator, dtype=torch.float64)
            layer.requires_grad_(False)
        self.student.requires_grad_(trained_head)
        self.hidden, self.of_teacher = torch.randn(2, int(MASK.sum()), H, generator=generator, dtype=torch.float64)
        self.targets = torch.randint(V, (int(MASK.sum()),), generator=generator)
        self.leaves = [self.hidden.requires_grad_(), *(self.student.parameters() if trained_head else ())]
        self.z, self.z_teacher = self.student(self.hidden), self.teacher(self.of_teacher)

    def at_target(self, values):
        return values.gather(-1, self.targets[:, None])[:, 0]

    @property
    def cross_entropy(self):
        return F.cross_entropy(self.z, self.targets, reduction="none")

    def loss(self, objective):
        names = {name for measure in objective.measures.values() for name in measure.references}
        scores = token_scores(
            Distribution(self.hidden, Head(embeddings=self.student)),
            self.targets,
            measures=objective.measures,
            references=dict.fromkeys(names, Distribution(self.of_teacher, Head(embeddings=self.teacher))),
            chunk_tokens=3,
        )
        rows = lambda values: torch.zeros(N, T, dtype=values.dtype).masked_scatter(MASK, values)  # noqa: E731
        batch = CompletionBatch(
            logprobs=rows(scores.logprobs),
            measures={name: rows(values) for name, values in scores.measures.items()},
            completion_mask=MASK,
            prompt_index=torch.arange(N),
        )
        return objective(batch).mean()


def emo(world, variant=1, largest=None):
    e = F.normalize(world.student.weight.detach(), dim=-1)
    demd = 1 - ((world.z.softmax(-1) @ e) * e[world.targets]).sum(-1)
    mle = world.cross_entropy
    if variant == 2:
        return ((demd / mle).detach() * mle + demd) / 2
    ratio = (mle / demd).detach()
    return (mle + (ratio if largest is None else ratio.clamp(max=largest)) * demd) / 2


def pld(world):
    values = []
    for z, teacher, y in zip(world.z, world.z_teacher.softmax(-1), world.targets.tolist(), strict=True):
        order = [y, *(v for v in teacher.argsort(descending=True).tolist() if v != y)]
        parts = [teacher[order[i]] * (z[order[i:]].logsumexp(0) - z[order[i]]) for i in range(V)]
        values.append(torch.stack(parts).sum())
    return torch.stack(values)


def forward_kl(world, temperature):
    q, p = (z.div(temperature).log_softmax(-1) for z in (world.z_teacher, world.z))
    return (q.exp() * (q - p)).sum(-1)


def sinkd(world):
    costs = []
    for z, z_teacher in zip(world.z.split(2), world.z_teacher.split(2), strict=True):
        distance = torch.cdist(z.div(2).softmax(-1), z_teacher.div(2).softmax(-1), p=1)
        plan = torch.exp(-distance / 0.1)
        for _ in range(20):
            plan = plan / plan.sum(1, keepdim=True)
            plan = plan / plan.sum(0, keepdim=True)
        costs.append((plan * distance).sum())
    # Of all blocks: 0.001 times the sums, over the number of blocks' rows.
    transport = 0.001 * 2 * torch.stack(costs).sum() / len(world.z)
    return world.cross_entropy + 0.9 * forward_kl(world, 2.0) + transport


def star(world):
    q, p = world.z_teacher.softmax(-1), world.z.softmax(-1)
    top = torch.zeros_like(q, dtype=torch.bool).scatter(-1, q.topk(3).indices, True)
    own = torch.zeros_like(q, dtype=torch.bool).scatter(-1, p.topk(2).indices, True)
    return (top * q * (q / p).log()).sum(-1) + 10 * (own & ~top).mul(p).sum(-1)


def lskd(world):
    q, p = (((z - z.mean(-1, True)) / (z.std(-1, keepdim=True) + 1e-7) / 2) for z in (world.z_teacher, world.z))
    kl = (q.softmax(-1) * (q.log_softmax(-1) - p.log_softmax(-1))).sum(-1)
    return world.cross_entropy + 3 * kl


def nkd(world):
    teacher, others = world.z_teacher.softmax(-1), torch.arange(V) != world.targets[:, None]
    q, p = (z[others].view(-1, V - 1).div(2.0).log_softmax(-1) for z in (world.z_teacher, world.z))
    kl = (q.exp() * (q - p)).sum(-1)
    return world.cross_entropy * (1 + world.at_target(teacher)) + 1.5 * 4 * kl


CASES = {
    "EMO": (methods.EMO(), emo),
    "EMO bounded": (methods.EMO(largest=1.5), lambda world: emo(world, largest=1.5)),
    "EMO 2": (methods.EMO(2), lambda world: emo(world, 2)),
    "PLD": (methods.PLD(V), pld),
    "SinKD": (methods.SinKD(2, kl_weight=0.9), sinkd),
    "STARCKD": (methods.STARCKD(3, stray_top=2), star),
    "LSKD": (methods.LSKD(weight=3.0), lskd),
    "NKD": (methods.NKD(temperature=2.0), nkd),
}


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_loss_and_its_gradient_are_those_of_the_paper(name, trained_head):
    objective, formula = CASES[name]
    world = World(trained_head=trained_head)
    wanted = formula(world).mean()
    found = world.loss(objective)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(loss, world.leaves, retain_graph=True) for loss in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)


def test_a_teacher_that_knows_the_answer_makes_pld_the_cross_entropy():
    world = World(trained_head=False)
    world.teacher = torch.nn.Identity()
    world.of_teacher = 1e3 * F.one_hot(world.targets, V).double()
    torch.testing.assert_close(world.loss(methods.PLD(V)), world.cross_entropy.mean(), rtol=1e-12, atol=0)


def test_wrong_choices_are_refused():
    with pytest.raises(ValueError, match="k=0 must be at least 1"):
        methods.PLD(0)
    with pytest.raises(ValueError, match="block=1 must be at least 2"):
        methods.SinKD(1)


@pytest.mark.parametrize(
    ("name", "method"),
    {
        "emo": methods.EMO(),
        "pld": methods.PLD(),
        "sinkd": methods.SinKD(),
        "star-ckd": methods.STARCKD(),
        "lskd": methods.LSKD(),
        "nkd": methods.NKD(),
    }.items(),
)
def test_the_run_file_of_a_method_has_its_objective(name, method):
    file = Path(__file__).parents[2] / "configs" / f"{name}-polite.yaml"
    assert load_run_file(file).check() == method
