"""A reference on a server, over a real tiny model behind vLLM's endpoints."""

import time

import pytest
import torch
from rich.console import Console

from falign.errors import ConfigError, EngineError
from falign.models import load_model, load_tokenizer
from falign.references import FrozenModel, VLLMReference
from falign.rollouts import PromptScorer
from falign.runfile import parse_run
from falign.scoring import PromptTree, pack, pad
from falign.training import train
from tests.models.tiny import VOCABULARY, save_tiny, swap_tokens, tiny_model, tiny_tokenizer
from tests.rollouts.loopback import Loopback
from tests.training.pairs import run_data, write_pairs
from tests.training.prompts import online_data, write_prompts

# transformers moves batches to pinned memory when asked to, and warns on a machine without an accelerator.
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

TREES = [
    PromptTree((40, 41, 42), ((60, 61, 1), (62, 1)), place="a:1"),
    PromptTree((43,), ((63, 64, 65, 66, 1), (60, 61, 1)), place="a:2"),
]
BATCH = pad(TREES, pad_token_id=1)


@pytest.fixture
def folder(tmp_path):
    return save_tiny(tmp_path / "teacher", seed=3)


@pytest.fixture
def serve(folder):
    started = []

    def start(**options):
        started.append(Loopback(folder, **{"max_rank": 0, **options}).start())
        return started[-1]

    yield start
    for server in started:
        server.stop()


def reference_of(server, **options):
    return VLLMReference(PromptScorer(server.url, **{"timeout": 20.0, "wait": 0.0, **options}), place="teacher")


def policy():
    return tiny_model("llama", seed=0)


def test_it_gives_the_log_probabilities_of_the_model_that_is_served(serve, folder):
    server = serve()
    expected = FrozenModel(load_model(str(folder))).logprobs(policy(), BATCH)
    for batch in (BATCH, pack(TREES, pad_token_id=1)):
        torch.testing.assert_close(reference_of(server).logprobs(policy(), batch), expected, rtol=0, atol=1e-6)
    (body, *_), prompt = server.calls("/v1/completions"), [43, 63, 64, 65, 66, 1]
    assert (body["temperature"], body["prompt_logprobs"], body["max_tokens"]) == (1.0, 0, 1)
    assert [prompt] in [each["prompt"] for each in server.calls("/v1/completions")]


def test_equal_sequences_are_asked_for_once(serve):
    server = serve()
    twice = pad([TREES[0], TREES[0]], pad_token_id=1)
    logprobs = reference_of(server).logprobs(policy(), twice)
    assert len(server.calls("/v1/completions")) == 2
    assert torch.equal(logprobs[:2], logprobs[2:])


def test_the_tokens_of_the_policy_are_accepted_and_the_first_other_one_is_named(serve, folder):
    assert reference_of(serve()).check_fits(tiny_tokenizer(), VOCABULARY) == VOCABULARY
    tokenizer = load_tokenizer(str(folder))
    one, two = tokenizer.convert_ids_to_tokens([70, 90])
    swap_tokens(folder, one, two)
    with pytest.raises(ConfigError, match=f"the id 70 is {one!r} in the first and {two!r} in the second"):
        reference_of(serve()).check_fits(tiny_tokenizer(), VOCABULARY)


def test_tokens_that_are_parts_of_characters_are_compared_too(serve, folder):
    tokenizer = load_tokenizer(str(folder))
    one, two = tokenizer.tokenize("é")  # alone, each is decoded as a replacement character
    assert tokenizer.decode(tokenizer.convert_tokens_to_ids([one])) == tokenizer.decode(
        tokenizer.convert_tokens_to_ids([two])
    )
    swap_tokens(folder, one, two)
    with pytest.raises(ConfigError, match=r"'©' has the id 106 in the first and 131 in the second"):
        reference_of(serve()).check_fits(tiny_tokenizer(), VOCABULARY)


@pytest.mark.parametrize("rows", [VOCABULARY - 7, VOCABULARY + 4])
def test_a_smaller_head_is_shared_and_a_larger_one_refused(serve, folder, rows):
    model = load_model(str(folder))
    model.resize_token_embeddings(rows)
    model.save_pretrained(folder)
    reference = reference_of(serve())
    if rows < VOCABULARY:
        assert reference.check_fits(tiny_tokenizer(), VOCABULARY) == rows
    else:
        with pytest.raises(ConfigError, match=rf"more than the {VOCABULARY} ids"):
            reference.check_fits(tiny_tokenizer(), VOCABULARY)


def test_rows_that_are_too_long_are_refused_by_name(serve):
    reference = reference_of(serve(max_length=6))
    with pytest.raises(ConfigError, match=r"teacher, a:1: 6 tokens and one that vLLM adds are more than the 6"):
        reference.logprobs(policy(), BATCH)


def test_a_server_that_is_lost_is_waited_for_and_asked_for_the_rest(serve, folder):
    server = serve(die_after=2)
    reference = reference_of(server, wait=20.0)
    server.restart_in(0.5)
    logprobs = reference.logprobs(policy(), BATCH)
    expected = FrozenModel(load_model(str(folder))).logprobs(policy(), BATCH)
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-6)
    assert server.starts == 2


def test_broken_connections_are_repeated_and_the_fourth_ends_the_call(serve):
    server = serve(hang_up=1, truncate=1)
    reference_of(server).logprobs(policy(), BATCH)
    server.change(hang_up=100)
    with pytest.raises(EngineError, match="the 4th time"):
        reference_of(server).logprobs(policy(), BATCH)


def test_a_server_that_stays_away_or_comes_back_with_another_model_is_refused(serve):
    server = serve(die_after=0)
    with pytest.raises(EngineError, match=r"no vLLM server for wait=0 seconds"):
        reference_of(server).logprobs(policy(), BATCH)
    server = serve(die_after=0)
    reference = reference_of(server, wait=20.0)
    server.change(version="0.33.0")
    server.restart_in(0.5)
    with pytest.raises(EngineError, match="came back with another model"):
        reference.logprobs(policy(), BATCH)


def test_a_call_ends_at_its_deadline(serve):
    reference, start = reference_of(serve(delay=5.0), timeout=0.5), time.monotonic()
    with pytest.raises(EngineError, match=r"no answer within timeout=0\.5 seconds"):
        reference.logprobs(policy(), BATCH)
    assert time.monotonic() - start < 4.0


def without_target(reply):
    (choice,) = reply["choices"]
    token = choice["prompt_token_ids"][1]
    choice["prompt_logprobs"][1] = {str(token + 1): {"logprob": -1.0}}
    return reply


def with_logprob(value):
    def change(reply):
        (choice,) = reply["choices"]
        choice["prompt_logprobs"][1][str(choice["prompt_token_ids"][1])]["logprob"] = value
        return reply

    return change


def shorter(reply):
    reply["choices"][0]["prompt_logprobs"].pop()
    return reply


def none_at_all(reply):
    del reply["choices"][0]["prompt_logprobs"]
    return reply


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"changes_prompt": True}, "its tokens are not those that were sent"),
        ({"drops_choice": True}, "not enough values"),
        ({"garble": 1}, "the reply is not JSON"),
        ({"change_reply": lambda reply: {**reply, "model": "other"}}, "it is of 'other'"),
        ({"change_reply": without_target}, "the log-probability of token 4. at position 1 is missing|token 63"),
        ({"change_reply": with_logprob(float("nan"))}, "has the log-probability nan"),
        ({"change_reply": with_logprob(-9999.0)}, r"has the log-probability -9999\.0"),
        ({"change_reply": with_logprob(0.5)}, r"has the log-probability 0\.5"),
        ({"change_reply": shorter}, "tokens and . prompt_logprobs"),
        ({"change_reply": none_at_all}, "prompt_logprobs"),
        ({"fail": 1}, "status 500: Internal Server Error"),
    ],
)
def test_a_reply_that_does_not_fit_is_refused(serve, switches, message):
    with pytest.raises(EngineError, match=message):
        reference_of(serve(**switches)).logprobs(policy(), BATCH)


def test_servers_with_adapters_and_models_that_are_not_there_are_refused(serve):
    with pytest.raises(ConfigError, match="serves adapters"):
        reference_of(serve(max_rank=8))
    with pytest.raises(ConfigError, match="serves base, and model='other' was asked for"):
        reference_of(serve(), model="other")


def test_a_server_without_developer_mode_is_accepted(serve):
    reference = reference_of(serve(without=frozenset({"/server_info"})), model="base")
    assert reference.identity()["vllm"] == "0.32.0"


@pytest.fixture
def pairs(tmp_path):
    save_tiny(tmp_path / "tiny")
    return write_pairs(tmp_path / "pairs.jsonl", n=8)


def test_a_run_learns_what_it_learns_from_the_same_model_in_memory(serve, folder, pairs, tmp_path):
    found = {}
    for name, section in {
        "memory": {"kind": "frozen", "path": str(folder)},
        "server": {"kind": "vllm", "url": serve().url, "timeout": 20.0, "wait": 0.0},
    }.items():
        run = run_data(tmp_path / "tiny", pairs, tmp_path / name, reference=section, training={"max_steps": 3})
        summary = train(parse_run(run), console=Console(quiet=True))
        found[name] = [log["loss"] for log in summary.folder.metrics() if "loss" in log]
        record = summary.folder.read_manifest()["reference"]
    assert found["server"] == pytest.approx(found["memory"], abs=1e-6)
    assert len(found["server"]) == 3
    assert {"kind": "vllm", "model": "base", "root": str(folder), "vllm": "0.32.0"}.items() <= record.items()


def test_a_run_resumes_with_another_address_of_the_same_model_and_not_with_another_model(serve, pairs, tmp_path):
    def run(server, steps):
        section = {"kind": "vllm", "url": server.url, "wait": 0.0}
        training = {"max_steps": steps, "save_steps": 2, "lr_scheduler_type": "constant"}
        return parse_run(run_data(tmp_path / "tiny", pairs, tmp_path / "run", reference=section, training=training))

    train(run(serve(), 2), console=Console(quiet=True))
    with pytest.raises(ConfigError, match="the reference"):
        train(run(serve(version="0.33.0"), 4), resume=True, console=Console(quiet=True))
    summary = train(run(serve(), 4), resume=True, console=Console(quiet=True))
    assert [log["step"] for log in summary.folder.metrics() if "loss" in log] == [1, 2, 3, 4]


def test_a_server_that_reads_too_little_is_refused_before_the_first_step(serve, pairs, tmp_path):
    section = {"kind": "vllm", "url": serve(max_length=20).url, "wait": 0.0}
    run = run_data(tmp_path / "tiny", pairs, tmp_path / "run", reference=section)
    with pytest.raises(ConfigError, match=r"reference: \d+ tokens and one that vLLM adds are more than the 20"):
        train(parse_run(run), console=Console(quiet=True))


def test_a_student_learns_from_a_teacher_on_a_server(serve, pairs, tmp_path):
    server = serve()
    run = online_data(
        tmp_path / "tiny",
        write_prompts(tmp_path / "prompts.jsonl", n=8),
        tmp_path / "run",
        references={"reference": {"kind": "adapter_off"}, "teacher": {"kind": "vllm", "url": server.url, "wait": 0.0}},
        objective={"kind": "distillation", "divergence": "reverse_kl", "level": "token"},
        rewards=[],
        training={"max_steps": 2, "learning_rate": 0.01},
    )
    summary = train(parse_run(run), console=Console(quiet=True))
    assert len([log for log in summary.folder.metrics() if "loss" in log]) == 2
    assert server.calls("/v1/completions")


@pytest.mark.parametrize(
    ("reader", "changes"),
    [
        ("measures.near", {"measures": {"near": "divergence_to(forward_kl)"}}),
        ("objective.kind=token_pairwise", {"objective": {"kind": "token_pairwise"}}),
        (
            "references.reference",
            {
                "references": {
                    "reference": {"kind": "geometric", "weights": {"teacher": 1.5, "base": -0.5}},
                    "teacher": {"kind": "vllm"},
                    "base": {"kind": "adapter_off"},
                }
            },
        ),
    ],
)
def test_a_reader_of_whole_distributions_is_refused_before_the_server_is_asked(pairs, tmp_path, reader, changes):
    run = run_data(tmp_path / "tiny", pairs, tmp_path / "run")
    run |= changes if "references" in changes else {"reference": {"kind": "vllm"}, **changes}
    if "references" in changes:
        run.pop("reference", None)
    with pytest.raises(ConfigError, match=rf"kind=vllm: {reader} reads the whole distributions.*kind: frozen"):
        parse_run(run).check()


def test_a_cache_is_refused(pairs, tmp_path):
    run = run_data(tmp_path / "tiny", pairs, tmp_path / "run", reference={"kind": "vllm", "cache": "cache"})
    with pytest.raises(ConfigError, match="a server gives no hash of its weights"):
        parse_run(run)
