"""A reference on a real vLLM server with SmolLM2-135M in float32; a minute or two and 4 GiB."""

import threading

import pytest
import torch

from falign.errors import ConfigError
from falign.models import load_model, load_tokenizer
from falign.references import FrozenModel, VLLMReference
from falign.rollouts import PromptScorer
from falign.scoring import PromptTree, pack
from tests.models.tiny import tiny_model, tiny_tokenizer
from tests.rollouts import test_vllm_server
from tests.rollouts.test_vllm_server import WAIT, Server

pytestmark = test_vllm_server.pytestmark


@pytest.fixture(scope="module")
def teacher(served_folder):
    server = Server(served_folder, served_folder.parent / "teacher.log", rank=0)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def reference(teacher):
    return VLLMReference(PromptScorer(teacher.url, timeout=WAIT, wait=WAIT), place="teacher")


@pytest.fixture(scope="module")
def batch(served_folder):
    """Prompts of one token, of a few, and of several blocks of the server's cache, twice with one beginning."""
    tokenizer = load_tokenizer(str(served_folder))
    long = "Water boils at " + "a hundred degrees, and " * 60
    texts = {
        "The": [" end", " sea é ü ж 火"],
        "The capital of France is": [" Paris.", " London, of course"],
        long: [" it is hot", " it is hot there"],
        long + "so": [" it is hot"],
    }
    encode = {text: tuple(tokenizer(text)["input_ids"]) for each in texts.items() for text in (each[0], *each[1])}
    return pack(
        [PromptTree(encode[prompt], tuple(encode[text] for text in answers)) for prompt, answers in texts.items()],
        pad_token_id=0,
    )


def test_log_probabilities_are_those_of_the_model_in_memory_also_from_a_warm_cache(reference, served_folder, batch):
    expected = FrozenModel(load_model(str(served_folder), dtype="float32")).logprobs(tiny_model("llama"), batch)
    for _ in range(2):
        torch.testing.assert_close(reference.logprobs(tiny_model("llama"), batch), expected, rtol=0, atol=2e-4)


def test_the_tokenizer_of_the_model_fits_and_another_is_refused(reference, served_folder):
    assert reference.check_fits(load_tokenizer(str(served_folder)), 49152) == 49152
    with pytest.raises(ConfigError, match="have different tokens"):
        VLLMReference(reference.scorer).check_fits(tiny_tokenizer(), 49152)
    with pytest.raises(ConfigError, match="more than the 49000 ids"):
        reference.check_fits(load_tokenizer(str(served_folder)), 49000)


def test_a_server_killed_half_way_and_started_anew_gives_the_same(reference, teacher, batch):
    expected = reference.logprobs(tiny_model("llama"), batch)
    killed = threading.Timer(0.2, lambda: (teacher.kill(), teacher.start()))
    killed.start()
    found = reference.logprobs(tiny_model("llama"), batch)
    killed.join()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
