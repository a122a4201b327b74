import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from falign.errors import ModelError
from falign.scoring import Distribution, Head, check_head, model_parts, read_head, token_scores
from tests.scoring.models import FAMILIES, tiny_model, with_lora


@pytest.mark.parametrize(
    ("family", "scale", "softcap"),
    [
        ("llama", 1.0, None),
        ("gemma2", 1.0, 2.0),
        ("cohere", 0.25, None),
        ("granite", 0.25, None),
        ("hyperclovax", 0.5, None),
    ],
)
def test_scale_and_softcap_are_read_from_the_configuration(family, scale, softcap):
    model = tiny_model(family)
    read = read_head(model)
    assert (read.scale, read.softcap) == (scale, softcap)
    assert read.embeddings is model.get_output_embeddings()


def test_a_model_without_head_is_refused():
    with pytest.raises(ModelError, match="no output embeddings"):
        read_head(tiny_model().model)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 1000])
def test_values_and_gradients_are_those_of_a_dense_log_softmax(chunk_tokens):
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    layer = torch.nn.Linear(5, 11, dtype=torch.float64)
    targets, weights = torch.randint(11, (7,)), torch.randn(7, dtype=torch.float64)
    leaves = (hidden, layer.weight, layer.bias)

    logits = 3 * torch.tanh(0.5 * (hidden @ layer.weight.T + layer.bias) / 3)
    dense = logits - torch.log(torch.exp(logits).sum(-1, keepdim=True))
    expected = torch.autograd.grad((weights * dense[range(7), targets]).sum(), leaves)

    scores = token_scores(
        Distribution(hidden, Head(embeddings=layer, scale=0.5, softcap=3.0)), targets, chunk_tokens=chunk_tokens
    )
    gradients = torch.autograd.grad((weights * scores.logprobs).sum(), leaves)
    torch.testing.assert_close(scores.logprobs, dense[range(7), targets], rtol=0, atol=1e-12)
    torch.testing.assert_close(scores.entropy, -(dense.exp() * dense).sum(-1).detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients, expected, rtol=0, atol=1e-12)
    assert not scores.entropy.requires_grad


def test_sixteen_bit_logits_are_normalised_in_float32():
    torch.manual_seed(0)
    hidden, layer = torch.randn(4, 8).bfloat16(), torch.nn.Linear(8, 50).bfloat16()
    targets = torch.tensor([0, 1, 2, 3])
    scores = token_scores(Distribution(hidden, Head(embeddings=layer)), targets)
    exact = layer(hidden).double().log_softmax(-1)[range(4), targets]
    assert scores.logprobs.dtype == torch.float32
    torch.testing.assert_close(scores.logprobs.double(), exact, rtol=0, atol=1e-5)


def test_entropy_is_finite_where_a_probability_is_zero():
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    scores = token_scores(Distribution(logits, Head(embeddings=torch.nn.Identity())), torch.tensor([0]))
    assert scores.entropy.item() == pytest.approx(0.6931472)


@pytest.mark.parametrize(("chunk_tokens", "num_tokens"), [(0, 3), (4, 0)])
def test_nothing_to_score_and_no_chunk_are_refused(chunk_tokens, num_tokens):
    with pytest.raises(ValueError, match="must be at least 1"):
        token_scores(
            Distribution(torch.zeros(num_tokens, 4), Head(embeddings=torch.nn.Identity())),
            torch.zeros(num_tokens, dtype=torch.long),
            chunk_tokens=chunk_tokens,
        )


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return out


def test_no_tensor_of_tokens_by_vocabulary_exists_in_either_pass():
    num_tokens, vocabulary, chunk_tokens = 64, 1000, 4
    layer = torch.nn.Linear(8, vocabulary)
    hidden = torch.randn(num_tokens, 8, requires_grad=True)
    targets = torch.randint(vocabulary, (num_tokens,))
    with LargestTensor() as chunked:
        token_scores(
            Distribution(hidden, Head(embeddings=layer)), targets, chunk_tokens=chunk_tokens
        ).logprobs.sum().backward()
    with LargestTensor() as dense:
        layer(hidden).log_softmax(-1)[range(num_tokens), targets].sum().backward()
    assert chunked.numel == max(chunk_tokens * vocabulary, 8 * vocabulary)
    assert dense.numel == num_tokens * vocabulary


def test_the_forward_pass_saves_nothing_that_grows_with_the_vocabulary_but_the_weight():
    layer = torch.nn.Linear(8, 1000)
    sizes = []

    def record(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        policy = Distribution(torch.randn(64, 8, requires_grad=True), Head(embeddings=layer))
        token_scores(policy, torch.zeros(64, dtype=torch.long))
    assert max(sizes, default=0) <= 64 * 8


def test_dropout_in_an_adapter_on_the_head_is_the_same_in_both_passes():
    model = with_lora(tiny_model(), trained=True, target_modules=["lm_head"], lora_dropout=0.5).train()
    layer = model.get_base_model().lm_head
    hidden, targets = torch.randn(6, 16), torch.randint(97, (6,))
    leaves = [layer.lora_A.default.weight, layer.lora_B.default.weight]
    torch.manual_seed(3)
    expected = torch.autograd.grad(layer(hidden).log_softmax(-1)[range(6), targets].sum(), leaves)
    torch.manual_seed(3)
    loss = token_scores(Distribution(hidden, read_head(model)), targets, chunk_tokens=6).logprobs.sum()
    torch.rand(1)  # Another consumer of the random state between the passes.
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_that_was_read_passes_the_check_against_the_model(family):
    model = tiny_model(family).train()
    check_head(model, range(3, 20))
    assert model.training


def test_the_check_finds_a_scale_that_is_not_known(monkeypatch):
    monkeypatch.setattr(model_parts, "_DIVISORS", ())
    with pytest.raises(ModelError, match=r"GraniteForCausalLM differ.*read_head does not support"):
        check_head(tiny_model("granite"), range(3, 20))


def test_the_check_finds_scores_that_are_not_numbers():
    model = tiny_model()
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    with pytest.raises(ModelError, match="logits that are not finite: its weights are damaged"):
        check_head(model, range(3, 20))
