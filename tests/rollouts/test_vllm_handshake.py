"""What a run finds out about a server before its first step, and about each version after it."""

import pytest
import torch

from falign.errors import ConfigError, EngineError
from falign.models import add_lora, load_model
from falign.models.heads import share_head
from falign.rollouts import SamplingParams, shake_hands
from tests.models.tiny import fill_adapter, tiny_tokenizer
from tests.rollouts.loopback import policy_of

# PEFT 0.21 reads an attribute that Transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

PROMPTS = [[5, 6, 7] * 10, [4, 8, 15, 16, 23, 42]]


def fresh(server, dtype="float32"):
    return add_lora(load_model(server.model_folder, dtype=dtype), r=4, alpha=8, seed=0)  # B = 0


def encode(text):
    return tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]


def shake(engine, policy, temperature=0.8, **options):
    options = {"encode": encode, "prompt_ids": PROMPTS, "longest": 60, **options}
    return shake_hands(engine, policy, params=SamplingParams(20, temperature=temperature), **options)


@pytest.mark.parametrize("sync", ["adapter", "merged"])
def test_a_sound_server_agrees_and_the_policy_is_left_as_it_was(serve, connect, sync):
    server = serve()
    policy = fresh(server)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    found = shake(connect(server, sync=sync), policy)
    assert found.sync == sync
    assert found.gap.num_tokens == 2 * 4 * 8
    assert found.gap.mean < found.gap.max < 1e-4
    assert found.bound == 1e-3
    assert "differ by" in str(found)
    assert not found.is_suspicious
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert server.adapters == {}


def test_full_fine_tuning_is_tried_on_a_layer_that_is_changed_for_it(serve, connect):
    server = serve()
    policy = load_model(server.model_folder, dtype="float32")
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    assert shake(connect(server), policy).gap.max < 1e-4
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


def test_raw_logprobs_are_refused_by_what_the_server_says(serve, connect):
    server = serve(settings={"vllm_config.model_config.logprobs_mode": "raw_logprobs"})
    with pytest.raises(ConfigError, match="--logprobs-mode processed_logprobs"):
        connect(server)


def test_raw_logprobs_are_found_out_where_the_server_says_otherwise(serve, connect):
    server = serve(raw_logprobs=True)
    with pytest.raises(ConfigError, match="off on average"):
        shake(connect(server), fresh(server))


def test_a_server_without_its_settings_is_refused(serve, connect):
    with pytest.raises(ConfigError, match="VLLM_SERVER_DEV_MODE=1"):
        connect(serve(without=frozenset({"/server_info"})))


def test_settings_that_are_not_vllms_are_told(serve, connect):
    server = serve(settings={"vllm_config": {}})
    with pytest.raises(EngineError, match="KeyError 'model_config'"):
        connect(server)


def test_replicas_are_refused(serve, connect):
    server = serve(settings={"vllm_config.parallel_config.data_parallel_size": 2})
    with pytest.raises(ConfigError, match="data_parallel_size=2"):
        connect(server)


def test_a_server_that_takes_no_adapters_while_it_runs_is_sent_whole_weights(serve, connect):
    server = serve(settings={"vllm_env.VLLM_ALLOW_RUNTIME_LORA_UPDATING": False})
    found = shake(connect(server), fresh(server))
    assert found.sync == "merged"
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in str(found)


def test_another_tokenizer_is_refused(serve, connect):
    server = serve()
    server.on_tokenize = lambda body: (200, {"tokens": [1, 2, 3]})
    with pytest.raises(ConfigError, match="its tokenizer"):
        shake(connect(server), fresh(server))


def test_a_run_that_is_longer_than_the_server_takes_is_refused(serve, connect):
    server = serve(max_length=50)
    with pytest.raises(ConfigError, match="--max-model-len is 50"):
        shake(connect(server), fresh(server))


def test_a_server_of_a_policy_whose_head_is_cut_to_the_references_is_refused(serve, connect):
    server = serve()
    policy, reference = fresh(server), load_model(server.model_folder)
    reference.resize_token_embeddings(250)
    share_head(policy, reference)
    with pytest.raises(ConfigError, match=r"samples from all 260 rows of the policy's head, and the reference has 250"):
        shake(connect(server), policy)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_without_effect_is_refused_whatever_the_precision(serve, connect, dtype):
    server = serve(ignores_adapters=True)
    with pytest.raises(ConfigError, match="have no effect"):
        shake(connect(server), fresh(server, dtype))


def test_another_base_model_is_refused(serve, connect):
    server = serve()
    policy = fresh(server)
    with torch.no_grad():
        policy.get_base_model().lm_head.weight.mul_(1.05)
    with pytest.raises(ConfigError, match="Serve the very model"):
        shake(connect(server), policy)


def test_in_16_bits_the_gap_is_told_and_bounds_nothing_unless_asked(serve, connect):
    server = serve()
    policy = fresh(server, "bfloat16")
    found = shake(connect(server), policy)
    assert found.bound is None
    assert 1e-4 < found.gap.mean < 0.3
    assert "float32 there and bfloat16 here" in str(found)
    with pytest.raises(ConfigError, match=r"rollout\.engine\.max_gap"):
        shake(connect(server), policy, max_gap=1e-4)


# -- each version after it


def test_keys_and_values_of_older_weights_are_found_out(serve, connect):
    # T4: a server that serves the first adapter's cache for the second.
    server = serve()
    engine, policy = connect(server), fresh(server)
    shake(engine, policy)
    engine.publish(fill_adapter(policy, seed=1, scale=0.3), 0)
    server.change(first_adapter_for_all=True)
    with pytest.raises(EngineError, match=r"Version 1: .* does not sample these weights"):
        engine.publish(fill_adapter(policy, seed=2, scale=0.3), 1)


def test_a_reload_whose_cache_is_not_emptied_is_found_out(serve, connect):
    # T6
    server = serve(keeps_cache=True)
    with pytest.raises(ConfigError, match="have no effect"):
        shake(connect(server, sync="merged"), fresh(server))
    server.change(keeps_cache=False)
    engine, policy = connect(server, sync="merged"), fresh(server)
    server.stop()
    server.start()
    shake(engine, policy)
    server.change(keeps_cache=True)
    with pytest.raises(EngineError, match="does not sample these weights"):
        engine.publish(fill_adapter(policy, seed=1, scale=0.3), 0)


def test_an_adapter_that_is_read_again_at_every_step_is_never_asked_for(serve, connect):
    # T1 and T2: only load_inplace=true does that.
    server = serve()
    engine, policy = connect(server), policy_of(server)
    shake(engine, policy)
    engine.publish(policy, 0)
    assert not any(again for _, _, again in server.adapters.values())
