"""The engine against a server on this machine that answers, and fails, as vLLM does."""

import itertools
import threading
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model

from falign.errors import ConfigError, EngineError, RolloutError
from falign.models import load_model
from falign.rollouts import Engine, SamplingParams
from falign.rollouts.gap import recomputed_logprobs
from tests.models.tiny import VOCABULARY, fill_adapter
from tests.rollouts.loopback import policy_of

# PEFT 0.21 reads an attribute that Transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

PROMPTS = [[5, 6, 7], [9, 4] * 10, [4, 8, 15, 16, 23, 42]]
STOPS = frozenset({1, *range(40, 60)})
PARAMS = SamplingParams(max_new_tokens=10, stop_token_ids=STOPS)


def gap(model, rollouts, params=PARAMS):
    recomputed = recomputed_logprobs(model, rollouts, params)
    return max(
        abs(a - b)
        for rollout, row in zip(rollouts, recomputed, strict=True)
        for a, b in zip(rollout.logprobs, row, strict=True)
    )


def sample(engine, version, *, prompts=PROMPTS, n=4, params=PARAMS, seed=3):
    return engine.sample(prompts, n, params, version=version, seed=seed)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"temperature": 1.3, "top_k": 30, "top_p": 0.9}])
def test_logprobs_are_those_of_the_published_adapter(serve, connect, settings):
    server = serve()
    engine, policy = connect(server), policy_of(server)
    assert isinstance(engine, Engine)
    params = SamplingParams(max_new_tokens=10, stop_token_ids=STOPS, **settings)
    engine.publish(policy, 7)
    rollouts = sample(engine, 7, params=params)
    assert gap(policy, rollouts, params) < 1e-4
    with policy.disable_adapter():
        assert gap(policy, rollouts, params) > 0.1
    assert [rollout.prompt_ids for rollout in rollouts] == [tuple(prompt) for prompt in PROMPTS for _ in range(4)]
    assert {rollout.policy_version for rollout in rollouts} == {7}
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
    assert all(rollout.completion_ids[-1] in STOPS for rollout in rollouts if rollout.finish_reason == "stop")


def test_requests_leave_nothing_to_the_settings_of_server_or_model(serve, connect):
    server = serve()
    engine = connect(server)
    engine.publish(policy_of(server), 0)
    sample(engine, 0)
    for body in server.calls("/v1/completions"):
        assert body["ignore_eos"] is True
        assert body["stop_token_ids"] == sorted(STOPS)
        assert (body["repetition_penalty"], body["min_p"], body["logprobs"]) == (1.0, 0.0, 0)
        assert (body["presence_penalty"], body["frequency_penalty"]) == (0.0, 0.0)


def test_a_seed_repeats_a_call_and_a_seed_per_prompt_makes_it_independent_of_the_others(serve, connect):
    server = serve()
    engine = connect(server)
    engine.publish(policy_of(server), 0)
    first = sample(engine, 0)
    assert sample(engine, 0) == first
    assert sample(engine, 0, seed=4) != first
    together = sample(engine, 0, seed=[11, 12, 13])
    assert sample(engine, 0, prompts=PROMPTS[1:2], seed=[12]) == together[4:8]
    assert engine.sample(PROMPTS[1:], 4, PARAMS, version=0, seed=3, first=1) == first[4:]
    # vLLM gives completion j of a request the seed plus j: no two requests may be so near each other.
    sample(engine, 0, prompts=[PROMPTS[0]] * 3, seed=[11, 12, 13])
    sent = sorted(body["seed"] for body in server.calls("/v1/completions")[-3:])
    assert min(after - before for before, after in itertools.pairwise(sent)) > 4
    # Equal prompts of one call are answered independently of each other.
    twice = sample(engine, 0, prompts=[PROMPTS[0]] * 2)
    assert twice[:4] != twice[4:]


def test_greedy_completions_are_the_likeliest_tokens_drawn_from_a_point_mass(serve, connect):
    server = serve()
    engine, policy = connect(server), policy_of(server).eval()
    engine.publish(policy, 0)
    greedy = SamplingParams(max_new_tokens=6, temperature=0.0)
    rollouts = sample(engine, 0, params=greedy, n=2)
    assert rollouts[0] == rollouts[1]
    assert {value for rollout in rollouts for value in rollout.logprobs} == {0.0}
    ids = torch.tensor([rollouts[0].prompt_ids + rollouts[0].completion_ids])
    with torch.no_grad():
        assert policy(ids).logits[0, 2:-1].argmax(-1).tolist() == list(rollouts[0].completion_ids)


def test_two_versions_can_be_in_flight_and_each_is_exact(serve, connect):
    server = serve()
    engine, policy = connect(server), policy_of(server, seed=1)
    engine.publish(policy, 1)
    other = policy_of(server, seed=2)
    server.change(delay=0.3)
    found = {}
    thread = threading.Thread(target=lambda: found.update(old=sample(engine, 1)))
    thread.start()
    time.sleep(0.1)
    engine.publish(other, 2)  # while requests of version 1 run
    found["new"] = sample(engine, 2)
    thread.join()
    assert gap(policy, found["old"]) < 1e-4
    assert gap(other, found["new"]) < 1e-4
    assert gap(other, found["old"]) > 0.1


def test_a_name_and_a_path_are_used_once_and_nothing_is_loaded_in_place(serve, connect):
    server = serve()
    engine = connect(server)
    for version in (0, 1, 1, -4):  # one of them twice, with other weights
        engine.publish(policy_of(server, seed=10 + version), version)
        engine.retire(version - 1)
    loads = server.calls("/v1/load_lora_adapter")
    assert len({load["lora_name"] for load in loads}) == len({load["lora_path"] for load in loads}) == 4
    assert not any(load["load_inplace"] for load in loads)


def test_a_version_that_is_published_again_has_the_new_weights(serve, connect):
    server = serve()
    engine, old, new = connect(server), policy_of(server, seed=1), policy_of(server, seed=2)
    engine.publish(old, 0)
    engine.publish(new, 0)
    assert gap(new, sample(engine, 0)) < 1e-4
    assert len(server.adapters) == 1


def test_a_version_is_unloaded_before_its_folder_goes_one_version_later(serve, connect):
    server = serve()
    engine, policy = connect(server), policy_of(server)
    folders = []
    for version in range(3):
        engine.publish(policy, version)
        folders.append(engine._published[version].folder)
        sample(engine, version)
        engine.retire(version)
        assert server.adapters == {}
        assert [folder.exists() for folder in folders] == [False] * version + [True]
    with pytest.raises(RolloutError, match="Version 2 is not published"):
        sample(engine, 2)
    engine.close()
    assert not engine.folder.exists()


def test_what_is_left_half_written_is_never_loaded(serve, connect, monkeypatch):
    server = serve()
    engine, policy = connect(server), policy_of(server)

    def fails(*args, **kwargs):
        raise RuntimeError("half-way")

    monkeypatch.setattr("falign.rollouts.vllm_adapters.save_file", fails)
    with pytest.raises(RuntimeError, match="half-way"):
        engine.publish(policy, 0)
    assert not list(engine.folder.iterdir())
    assert not server.calls("/v1/load_lora_adapter")


def test_prompts_that_cannot_be_answered_are_refused_with_their_number(serve, connect):
    server = serve(max_length=30)
    engine = connect(server)
    engine.publish(policy_of(server), 0)
    for prompts, message in (([[]], "empty"), ([[VOCABULARY]], "token ids"), ([[3] * 25], "30 positions")):
        with pytest.raises(RolloutError, match=message):
            sample(engine, 0, prompts=prompts)
    with pytest.raises(RolloutError, match="seeds"):
        sample(engine, 0, seed=[1])
    with pytest.raises(RolloutError, match="n=0"):
        sample(engine, 0, n=0)
    assert not server.calls("/v1/completions")


# -- what is not servable as an adapter (T8)


def lora(server, **options):
    torch.manual_seed(0)
    base = load_model(server.model_folder, dtype="float32")
    config = LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "target_modules": ["q_proj", "v_proj"], **options})
    model = get_peft_model(base, config)
    with torch.no_grad():
        for parameter in filter(lambda each: each.requires_grad, model.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


UNSERVABLE = {
    "DoRA": ({"use_dora": True}, "use_dora"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    "rank": ({"r": 16}, "above --max-lora-rank 8"),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, "ends of the model"),
}


@pytest.mark.parametrize("name", UNSERVABLE)
def test_what_is_no_servable_adapter_is_brought_as_whole_weights(serve, connect, name):
    server = serve()
    options, reason = UNSERVABLE[name]
    model = lora(server, **options)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    engine = connect(server)
    engine.publish(model, 0)
    assert reason in engine.why_merged
    assert gap(model, sample(engine, 0)) < 1e-4
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not server.calls("/v1/load_lora_adapter")
    with pytest.raises(ConfigError, match=f"sync=adapter: .*{reason}"):
        connect(server, sync="adapter").publish(model, 0)


def test_full_fine_tuning_is_brought_as_whole_weights_and_the_server_is_left_as_it_was(serve, connect):
    server = serve()
    model = load_model(server.model_folder, dtype="float32")
    engine = connect(server)
    for version in range(3):
        with torch.no_grad():
            model.lm_head.weight.mul_(1.3)
        engine.publish(model, version)
        assert gap(model, sample(engine, version)) < 1e-4
        with pytest.raises(RolloutError, match="not published"):
            sample(engine, version - 1)
    paths = [path for path, _ in server.log if path in ("/pause", "/collective_rpc", "/reset_prefix_cache", "/resume")]
    assert paths == ["/pause", "/collective_rpc", "/reset_prefix_cache", "/resume"] * 3
    engine.close()
    first = load_model(server.model_folder, dtype="float32").state_dict()
    assert all(torch.equal(value, first[key]) for key, value in server.base.state_dict().items())


def test_plain_lora_can_be_asked_to_come_as_whole_weights(serve, connect):
    server = serve(max_rank=0)
    engine, policy = connect(server, sync="merged"), policy_of(server)
    engine.publish(policy, 0)
    assert gap(policy, sample(engine, 0)) < 1e-4


# -- faults


def test_a_call_that_takes_too_long_ends_with_what_to_do(serve, connect):
    server = serve()
    engine = connect(server, timeout=0.5)
    engine.publish(policy_of(server), 0)
    server.change(delay=2.0)
    with pytest.raises(EngineError, match=r"no answer within timeout=0\.5 seconds"):
        sample(engine, 0)


def test_an_error_of_a_server_that_goes_on_is_told(serve, connect):
    server = serve(fail=100)
    engine = connect(server, wait=20.0)
    engine.publish(policy_of(server), 0)
    with pytest.raises(EngineError, match=r"status 500: .*Internal Server Error"):
        sample(engine, 0)


def test_a_reply_that_ends_half_way_is_asked_for_again_and_not_for_ever(serve, connect):
    server = serve()
    engine = connect(server)
    engine.publish(policy_of(server), 0)
    sound = sample(engine, 0)
    server.change(truncate=2)
    assert sample(engine, 0) == sound
    server.change(truncate=1000)
    with pytest.raises(EngineError, match="4th time during one call"):
        sample(engine, 0)


def test_a_reply_that_is_no_json_is_told(serve, connect):
    server = serve(garble=1000)
    engine = connect(server)
    engine.publish(policy_of(server), 0)
    with pytest.raises(EngineError, match="the reply is not JSON"):
        sample(engine, 0)


def test_a_version_that_the_server_does_not_know_is_published_once_more(serve, connect):
    server = serve()
    engine, policy = connect(server), policy_of(server)
    engine.publish(policy, 0)
    sound = sample(engine, 0)
    fill_adapter(policy, seed=99)  # the policy has gone on: it is version 0 that is published again
    server.change(forget_after=server.asked + 1)
    assert sample(engine, 0) == sound
    assert len(server.calls("/v1/load_lora_adapter")) == 2


def test_a_version_that_the_server_goes_on_not_to_know_is_an_error(serve, connect):
    server = serve()
    engine = connect(server)
    engine.publish(policy_of(server), 0)
    server.adapters.clear()
    server.on_v1_load_lora_adapter = lambda body: (200, "Success")  # and does not do it
    with pytest.raises(EngineError, match="does not exist"):
        sample(engine, 0)


@pytest.mark.parametrize("sync", ["adapter", "merged"])
def test_a_server_that_dies_half_way_and_comes_back_is_brought_all_that_was_published(serve, connect, sync):
    server = serve()
    engine, policy = connect(server, wait=30.0, sync=sync), policy_of(server)
    engine.publish(policy, 0)
    sound = sample(engine, 0)
    fill_adapter(policy, seed=99)
    server.change(die_after=server.asked + 1)
    thread = server.restart_in(1.0)
    assert sample(engine, 0) == sound
    thread.join()
    assert server.starts == 2


@pytest.mark.parametrize("sync", ["adapter", "merged"])
def test_a_server_that_was_started_anew_between_two_calls_is_noticed(serve, connect, sync):
    server = serve()
    engine = connect(server, sync=sync)
    engine.publish(policy_of(server), 0)
    sound = sample(engine, 0)
    server.stop()
    server.start()
    assert sample(engine, 0) == sound


@pytest.mark.parametrize("sync", ["adapter", "merged"])
def test_replies_of_a_server_that_was_restarted_unseen_during_the_call_are_dropped(serve, connect, sync):
    server = serve()
    engine = connect(server, sync=sync)
    engine.publish(policy_of(server), 0)
    sound = sample(engine, 0)
    answer = server.on_v1_completions

    def restarted(body):
        server.on_v1_completions = answer
        server.restart_unseen()
        return answer(body)

    server.on_v1_completions = restarted
    assert sample(engine, 0) == sound
    assert server.starts > 1


def test_a_server_that_stays_away_is_an_error_that_says_how_to_go_on(serve, connect):
    server = serve()
    engine = connect(server, wait=0.5)
    engine.publish(policy_of(server), 3)
    server.stop()
    start = time.monotonic()
    message = r"no vLLM server for wait=0\.5 seconds; published are \[3\].*start or resume the run"
    with pytest.raises(EngineError, match=message):
        sample(engine, 3)
    assert time.monotonic() - start > 0.5


def test_a_server_that_comes_back_with_other_settings_is_refused(serve, connect):
    server = serve()
    engine = connect(server, wait=30.0)
    engine.publish(policy_of(server), 0)
    server.change(die_after=0, settings={"vllm_config.model_config.logprobs_mode": "raw_logprobs"})
    thread = server.restart_in(0.5)
    with pytest.raises(EngineError, match="came back with other settings"):
        sample(engine, 0)
    thread.join()


def test_an_engine_that_died_of_a_missing_folder_is_waited_for(serve, connect):
    # T2 and T3: vLLM dies where it wants to read an adapter again that is not there any more.
    server = serve()
    engine, policy = connect(server, wait=30.0), policy_of(server)
    engine.publish(policy, 0)
    sound = sample(engine, 0)
    name = engine._published[0].name
    model, folder, _ = server.adapters[name]
    server.adapters[name] = (model, folder.with_name("gone"), True)
    thread = server.restart_in(1.0)
    assert sample(engine, 0) == sound
    thread.join()


def test_a_folder_that_the_server_does_not_see_is_told(serve, connect, tmp_path):
    server = serve()
    engine = connect(server)
    server.on_v1_load_lora_adapter = lambda body: (404, {"error": {"message": "No adapter found"}})
    with pytest.raises(ConfigError, match=r"must see rollout\.engine.shared_dir under the same path"):
        engine.publish(policy_of(server), 0)


FALSE_REPLIES = {
    "of another model": (lambda reply: {**reply, "model": "base"}, "it is of 'base'"),
    "with a prompt of its own": ({"changes_prompt": True}, "its prompt is not the one"),
    "with one completion less": ({"drops_choice": True}, "3 completions, and 4"),
    "without logprobs": (
        lambda reply: {**reply, "choices": [dict(c, logprobs=None) for c in reply["choices"]]},
        "Type",
    ),
    "with a NaN": (
        lambda reply: {
            **reply,
            "choices": [
                dict(c, logprobs={"token_logprobs": [float("nan")] * len(c["token_ids"])}) for c in reply["choices"]
            ],
        },
        "has training diverged",
    ),
    "cut short": (
        lambda reply: {
            **reply,
            "choices": [
                dict(c, token_ids=c["token_ids"][:1], logprobs={"token_logprobs": c["logprobs"]["token_logprobs"][:1]})
                for c in reply["choices"]
            ],
        },
        "ends after 1 tokens",
    ),
    "that goes on after its end": (
        lambda reply: {
            **reply,
            "choices": [
                dict(
                    c,
                    token_ids=[1, *c["token_ids"]],
                    logprobs={"token_logprobs": [0, *c["logprobs"]["token_logprobs"]]},
                )
                for c in reply["choices"]
            ],
        },
        "after its end",
    ),
}


@pytest.mark.parametrize("name", FALSE_REPLIES)
def test_a_reply_that_is_no_answer_is_refused(serve, connect, name):
    change, message = FALSE_REPLIES[name]
    server = serve(**(change if isinstance(change, dict) else {"change_reply": change}))
    engine = connect(server)
    engine.publish(policy_of(server), 0)
    with pytest.raises(EngineError, match=message):
        sample(engine, 0)
