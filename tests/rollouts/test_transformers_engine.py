import math

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MambaConfig, MambaForCausalLM

from falign.errors import RolloutError
from falign.models import add_lora, enable_gradient_checkpointing, load_model
from falign.rollouts import Engine, SamplingParams, TransformersEngine
from falign.rollouts.decoding import Decoding
from falign.scoring import PromptTree, completion_scores, pack, pad
from tests.models.tiny import VOCABULARY, fill_adapter, tiny_model
from tests.rollouts.exact import processed

PROMPTS = [[5, 6, 7], [9, 4] * 10, [4, 8, 15, 16, 23, 42], [1, 1, 1, 30]]  # 1 is both padding and a stop token
STOPS = frozenset({1, *range(40, 60)})


def engine_of(model, **options):
    engine = TransformersEngine(model, pad_token_id=1, **options)
    engine.publish(model, 0)
    return engine


def sample(model, prompts=PROMPTS, n=4, *, seed=0, options=None, **settings):
    params = SamplingParams(**{"max_new_tokens": 14, "stop_token_ids": STOPS, **settings})
    return engine_of(model, **(options or {})).sample(prompts, n, params, version=0, seed=seed)


def sliding_model():
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"] * 2,
        initializer_range=0.2,
        final_logit_softcapping=10.0,
    )
    return Gemma3ForCausalLM(config)


MODELS = {
    "llama": lambda: tiny_model("llama"),
    "qwen2": lambda: tiny_model("qwen2"),
    "gpt2": lambda: tiny_model("gpt2"),
    "sliding": sliding_model,
    "adapter": lambda: fill_adapter(add_lora(tiny_model("llama"), r=4, alpha=8, seed=0)),
}


@pytest.mark.parametrize(("kind", "lay_out"), [*((kind, pad) for kind in MODELS), ("llama", pack), ("adapter", pack)])
def test_logprobs_are_those_of_scoring(kind, lay_out):
    model = MODELS[kind]().eval()
    rollouts = sample(model)
    trees = [
        PromptTree(tuple(prompt), tuple(rollout.completion_ids for rollout in rollouts[4 * i : 4 * i + 4]))
        for i, prompt in enumerate(PROMPTS)
    ]
    with torch.no_grad():
        batch = lay_out(trees, pad_token_id=1)
        recomputed = completion_scores(model, batch).logprobs[batch.completion_mask].tolist()
    assert [value for rollout in rollouts for value in rollout.logprobs] == pytest.approx(recomputed, abs=1e-5)
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.7}, {"top_k": 6}, {"top_p": 0.7}, {"temperature": 1.4, "top_k": 30, "top_p": 0.9}]
)
def test_logprobs_are_of_the_distribution_after_temperature_top_k_and_top_p(settings):
    model = tiny_model("llama").eval()
    rollouts = sample(model, n=2, **settings)
    exact = tiny_model("llama").double().eval()
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        with torch.no_grad():
            rows = exact(ids).logits[0, len(rollout.prompt_ids) - 1 : -1].tolist()
        expected = [
            math.log(processed(row, **settings)[id_]) for row, id_ in zip(rows, rollout.completion_ids, strict=True)
        ]
        assert list(rollout.logprobs) == pytest.approx(expected, abs=2e-5)


def test_frequencies_are_the_models_probabilities():
    model = tiny_model("llama", seed=3).eval()
    prompt, n = [7, 8, 9], 20_000
    rollouts = sample(model, [prompt], n, max_new_tokens=2, stop_token_ids=frozenset(), top_k=8, temperature=1.5)
    with torch.no_grad():
        firsts = processed(model(torch.tensor([prompt])).logits[0, -1].tolist(), temperature=1.5, top_k=8)
    expected = {}
    for first, share in enumerate(firsts):
        if share:
            with torch.no_grad():
                row = model(torch.tensor([[*prompt, first]])).logits[0, -1].tolist()
            seconds = processed(row, temperature=1.5, top_k=8)
            expected |= {(first, i): share * p for i, p in enumerate(seconds) if p}
    counts = dict.fromkeys(expected, 0)
    for rollout in rollouts:
        counts[rollout.completion_ids] += 1  # none is outside
    chi_squared = sum((counts[pair] - n * p) ** 2 / (n * p) for pair, p in expected.items())
    degrees = len(expected) - 1  # 63: a chi-squared variable is below its mean + 4 deviations but once in 10⁴
    assert degrees == 63
    assert chi_squared < degrees + 4 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("kind", MODELS)
def test_a_ragged_batch_decodes_as_each_prompt_alone(kind):
    model = MODELS[kind]()
    together = sample(model, n=1, temperature=0.0)
    alone = [sample(model, [prompt], 1, temperature=0.0)[0] for prompt in PROMPTS]
    assert together == alone
    assert len({rollout.completion_ids for rollout in together}) == len(PROMPTS)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "sliding"])
def test_greedy_decoding_is_a_plain_loop_without_cache(kind):
    model = MODELS[kind]().eval()
    for rollout in sample(model, n=1, temperature=0.0):
        ids = list(rollout.prompt_ids)
        with torch.no_grad():
            for _ in range(14):
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
                if ids[-1] in STOPS:
                    break
        assert ids[len(rollout.prompt_ids) :] == list(rollout.completion_ids)
        assert rollout.finish_reason == ("stop" if ids[-1] in STOPS else "length")
        assert set(rollout.logprobs) == {0.0}


def test_completions_are_those_of_batches_of_any_size():
    model = tiny_model("llama")
    whole = sample(model, n=5)
    for max_batch_tokens in (1, 60, 200):
        cut = sample(model, n=5, options={"max_batch_tokens": max_batch_tokens})
        assert [rollout.completion_ids for rollout in cut] == [rollout.completion_ids for rollout in whole]
    assert [rollout.prompt_ids for rollout in whole] == [tuple(prompt) for prompt in PROMPTS for _ in range(5)]


@pytest.mark.parametrize("kind", ["llama", "sliding"])
def test_rows_that_leave_change_nothing_for_those_that_stay(kind, monkeypatch):
    model = MODELS[kind]()
    monkeypatch.setattr("falign.rollouts.transformers_engine._MOST_ALIVE", -1.0)
    kept = sample(model, n=6)
    widths = []
    append = Decoding.append
    monkeypatch.setattr(Decoding, "append", lambda self, ids: (widths.append(len(ids)), append(self, ids))[1])
    monkeypatch.setattr("falign.rollouts.transformers_engine._MOST_ALIVE", 1.0)
    dropped = sample(model, n=6)
    assert [rollout.completion_ids for rollout in dropped] == [rollout.completion_ids for rollout in kept]
    for one, other in zip(dropped, kept, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    assert widths[0] > widths[-1]
    assert widths == sorted(widths, reverse=True)


def test_a_prompt_is_read_once_for_all_its_completions(monkeypatch):
    model = tiny_model("llama")
    shapes = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    sample(model, n=8, max_new_tokens=3, stop_token_ids=frozenset())
    assert shapes == [(4, 20), (32, 1), (32, 1)]


def test_only_one_position_a_row_reaches_the_head():
    model = tiny_model("llama")
    shapes = []
    model.lm_head.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    sample(model, n=2, max_new_tokens=3, stop_token_ids=frozenset())
    assert shapes == [(4, 64), (8, 64), (8, 64)]


def test_every_stop_token_is_the_last_of_its_completion():
    rollouts = sample(tiny_model("llama"), n=16, stop_token_ids=frozenset({44, 201, 1}), max_new_tokens=40)
    ends = {rollout.completion_ids[-1] for rollout in rollouts if rollout.finish_reason == "stop"}
    assert len(ends) > 1
    for rollout in rollouts:
        assert not {44, 201, 1} & set(rollout.completion_ids[:-1])
        assert len(rollout.completion_ids) == len(rollout.logprobs)
        assert (len(rollout.completion_ids) == 40) or rollout.finish_reason == "stop"


def test_a_seed_repeats_a_call_and_leaves_the_random_state_alone():
    model = tiny_model("llama")
    state = torch.get_rng_state()
    first = sample(model, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert sample(model, seed=4) == first
    other = sample(model, seed=5)
    assert [rollout.completion_ids for rollout in other] != [rollout.completion_ids for rollout in first]
    assert len({rollout.completion_ids for rollout in first[:4]}) == 4


def test_more_prompts_or_room_change_no_completion_before():
    model = tiny_model("llama")
    short = sample(model, PROMPTS[:2], max_new_tokens=5)
    long = sample(model, max_new_tokens=14)
    assert [rollout.completion_ids for rollout in short] == [rollout.completion_ids[:5] for rollout in long[:8]]


def test_what_the_models_own_settings_force_is_not_applied():
    model = tiny_model("llama")
    before = sample(model)
    model.generation_config.update(
        repetition_penalty=5.0, suppress_tokens=list(range(100)), temperature=0.1, top_k=1, do_sample=True, min_p=0.5
    )
    assert sample(model) == before


def test_modes_and_parameters_are_left_as_they_were():
    model = fill_adapter(add_lora(tiny_model("llama"), r=4, alpha=8, dropout=0.5, seed=0))
    model.train()
    model.base_model.model.model.layers[0].eval()
    before = {module: module.training for module in model.modules()}
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    rollouts = sample(model)
    assert {module: module.training for module in model.modules()} == before
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert sample(model.eval()) == rollouts


def test_gradient_checkpointing_and_a_config_without_cache_do_not_take_the_cache_away():
    model = tiny_model("llama")
    before = sample(model)
    enable_gradient_checkpointing(model)
    model.config.use_cache = False
    model.train()
    assert sample(model) == before


def test_the_adapter_acts_and_off_it_does_not():
    model = MODELS["adapter"]()
    on = sample(model)
    with model.disable_adapter():
        off = sample(model)
    assert off == sample(tiny_model("llama"))
    assert on != off


def test_log_probabilities_of_a_16_bit_model_are_near_those_of_its_own_scores():
    model = tiny_model("llama").bfloat16().eval()
    rollouts = sample(model, PROMPTS[:1], 8)
    tree = PromptTree(tuple(PROMPTS[0]), tuple(rollout.completion_ids for rollout in rollouts))
    batch = pack([tree], pad_token_id=1)
    with torch.no_grad():
        scores = completion_scores(model, batch).logprobs[batch.completion_mask]
    sampled = torch.tensor([value for rollout in rollouts for value in rollout.logprobs])
    assert (sampled - scores).abs().mean() < 0.1
    assert engine_of(model).capabilities().dtype == "bfloat16"


def test_versions_are_published_before_they_are_sampled():
    model = tiny_model("llama")
    engine = TransformersEngine(model, pad_token_id=1)
    assert isinstance(engine, Engine)
    params = SamplingParams(2)
    with pytest.raises(RolloutError, match=r"Version 3 is not what the engine holds \(None\)"):
        engine.sample([[5]], 1, params, version=3, seed=0)
    engine.publish(model, 3)
    assert engine.sample([[5]], 1, params, version=3, seed=0)[0].policy_version == 3
    engine.publish(model, 4)
    engine.retire(3)
    with pytest.raises(RolloutError, match="Version 3"):
        engine.sample([[5]], 1, params, version=3, seed=0)
    assert engine.sample([[5]], 1, params, version=4, seed=0)[0].policy_version == 4
    engine.retire(4)
    with pytest.raises(RolloutError, match=r"\(None\)"):
        engine.sample([[5]], 1, params, version=4, seed=0)
    with pytest.raises(RolloutError, match="another model"):
        engine.publish(tiny_model("llama"), 5)


def test_a_version_holds_what_the_weights_are_now():
    model = tiny_model("llama")
    engine = engine_of(model)
    params = SamplingParams(8)
    before = engine.sample(PROMPTS, 1, params, version=0, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    engine.publish(model, 1)
    after = engine.sample(PROMPTS, 1, params, version=1, seed=0)
    assert [rollout.logprobs for rollout in after] != [rollout.logprobs for rollout in before]


@pytest.mark.parametrize(
    ("prompts", "n", "message"),
    [
        ([[5], []], 1, "Prompt 1 is empty"),
        ([[5], [4, 5] * 1020], 1, "Prompt 1 has 2040 tokens, .* max_new_tokens=14 .* 2048 positions .* to 2034"),
        ([[5, VOCABULARY]], 1, f"Prompt 0 has the token ids 5 to {VOCABULARY}"),
        ([[-1]], 1, "Prompt 0 has the token ids -1"),
        ([[5]], 0, "n=0"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_anything_is_computed(prompts, n, message):
    model = tiny_model("llama")
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("computed"))
    with pytest.raises(RolloutError, match=message):
        sample(model, prompts, n)


def test_the_last_position_is_used():
    rollouts = sample(tiny_model("gpt2"), [[5, 6] * 505], 2, stop_token_ids=frozenset())  # 1010 + 14 = 1024
    assert {len(rollout.completion_ids) for rollout in rollouts} == {14}


def test_no_prompt_gives_no_rollout():
    assert sample(tiny_model("llama"), []) == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_name_their_place(temperature):
    model = tiny_model("llama")
    model.model.embed_tokens.weight.data[42] = float("nan")
    with pytest.raises(RolloutError, match="logits of completion 0 of prompt 2 are not finite after 0 tokens"):
        sample(model, temperature=temperature)


def test_a_model_in_data_parallelism_samples_as_itself(tmp_path):
    model = tiny_model("llama")
    alone = sample(model)
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        assert sample(DistributedDataParallel(model)) == alone
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_without_a_cache_of_keys_and_values_is_refused():
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1)
    with pytest.raises(RolloutError, match="MambaModel returns no cache"):
        sample(MambaForCausalLM(config))


@pytest.mark.slow
def test_a_real_model_answers_and_its_logprobs_are_those_of_scoring(demo):
    model = load_model(demo, dtype="float32").eval()
    prompt = tuple(range(500, 560))
    rollouts = sample(model, [prompt], 4, max_new_tokens=16, stop_token_ids=frozenset({2}))
    batch = pack([PromptTree(prompt, tuple(rollout.completion_ids for rollout in rollouts))], pad_token_id=2)
    with torch.no_grad():
        scores = completion_scores(model, batch).logprobs[batch.completion_mask].tolist()
    assert [value for rollout in rollouts for value in rollout.logprobs] == pytest.approx(scores, abs=1e-4)


def test_with_a_seed_for_each_prompt_the_prompts_beside_it_change_nothing():
    model = tiny_model("llama").eval()
    whole = sample(model, n=3, seed=[11, 12, 13, 11])
    alone = sample(model, PROMPTS[1:2], 3, seed=[12])
    assert [rollout.completion_ids for rollout in whole[3:6]] == [rollout.completion_ids for rollout in alone]
    assert len({rollout.completion_ids for rollout in alone}) == 3
    with pytest.raises(RolloutError, match="1 seeds for 2 prompts"):
        sample(model, PROMPTS[:2], 3, seed=[1])
