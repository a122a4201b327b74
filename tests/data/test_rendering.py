"""Chat templates in the manner of the well-known families, against conversations written out by hand."""

from typing import NamedTuple

import pytest

from falign.data import Example, encode
from falign.data.rendering import render
from falign.errors import ConfigError, DataError

SPECIAL_TOKENS = [
    "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<|user|>",
    "<|assistant|>", "<|system|>", "<|end|>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<BOS_TOKEN>",
    "<|END_OF_TURN_TOKEN|>",
    "<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>",
]  # fmt: skip


class Family(NamedTuple):
    """A template; what it makes of user "Hi there?", assistant "Yes.", user "Why?" and of the answer; what it needs."""

    template: str
    prompt: str
    completion: str
    bos: str
    eos: str
    stops: tuple[str, ...]
    adds_bos: bool = False


FAMILIES = {
    "chatml": Family(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_start|>user\nHi there?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        "Because.<|im_end|>",
        "<s>", "<|im_end|>", ("<|im_end|>", "<|endoftext|>"),
    ),
    "chatml, EOS is not its stop": Family(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_start|>user\nHi there?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        "Because.<|im_end|>",
        "<s>", "<|endoftext|>", ("<|im_end|>",),
    ),
    "qwen: default system turn": Family(
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nHi there?<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        "Because.<|im_end|>",
        "<|endoftext|>", "<|im_end|>", ("<|im_end|>", "<|endoftext|>"),
    ),
    "llama2": Family(
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}",
        "<s>[INST] Hi there? [/INST] Yes. </s><s>[INST] Why? [/INST]",
        " Because. </s>",
        "<s>", "</s>", ("</s>",), True,
    ),
    "mistral": Family(
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
        "{% else %}{{ raise_exception('Only user and assistant roles!') }}{% endif %}{% endfor %}",
        "<s>[INST] Hi there?[/INST] Yes.</s>[INST] Why?[/INST]",
        " Because.</s>",
        "<s>", "</s>", ("</s>",), True,
    ),
    "llama3": Family(
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
        "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi there?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "Why?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "Because.<|eot_id|>",
        "<|begin_of_text|>", "<|endoftext|>", ("<|eot_id|>", "<|endoftext|>"), True,
    ),
    "gemma": Family(
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' "
        "+ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        "<bos><start_of_turn>user\nHi there?<end_of_turn>\n<start_of_turn>model\nYes.<end_of_turn>\n"
        "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n",
        "Because.<end_of_turn>",
        "<bos>", "<eos>", ("<eos>", "<end_of_turn>"), True,
    ),
    "phi3: EOS after the last stop": Family(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        "<|user|>\nHi there?<|end|>\n<|assistant|>\nYes.<|end|>\n<|user|>\nWhy?<|end|>\n<|assistant|>\n",
        "Because.<|end|>",
        "<s>", "<|endoftext|>", ("<|end|>", "<|endoftext|>", "<|assistant|>"),
    ),
    "zephyr": Family(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        "<|user|>\nHi there?</s>\n<|assistant|>\nYes.</s>\n<|user|>\nWhy?</s>\n<|assistant|>\n",
        "Because.</s>",
        "<s>", "</s>", ("</s>",), True,
    ),
    "vicuna": Family(
        "{{ 'A chat between a user and an assistant.' }}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ ' USER: ' + m['content'] }}{% else %}{{ ' ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}",
        "A chat between a user and an assistant. USER: Hi there? ASSISTANT: Yes.</s> USER: Why? ASSISTANT:",
        " Because.</s>",
        "<s>", "</s>", ("</s>",), True,
    ),
    "alpaca-like: no stop in the template": Family(
        "{% for m in messages %}{{ '### ' + ('Instruction' if m['role'] == 'user' else 'Response') + ':\n' "
        "+ m['content'] }}{% if not loop.last %}{{ '\n\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n\n### Response:\n' }}{% endif %}",
        "### Instruction:\nHi there?\n\n### Response:\nYes.\n\n### Instruction:\nWhy?\n\n### Response:\n",
        "Because.</s>",
        "<s>", "</s>", ("</s>",),
    ),
    "deepseek-like": Family(
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>' + m['content'] }}"
        "{% else %}{{ '<|assistant|>' + m['content'] + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        "<｜begin▁of▁sentence｜><|user|>Hi there?<|assistant|>Yes.<｜end▁of▁sentence｜><|user|>Why?<|assistant|>",
        "Because.<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", ("<｜end▁of▁sentence｜>",), True,
    ),
    "tulu: EOS is also BOS": Family(
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{{ '<|assistant|>\n' + m['content'] + eos_token }}{% if not loop.last %}{{ '\n' }}{% endif %}"
        "{% else %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        "<|endoftext|><|user|>\nHi there?\n<|assistant|>\nYes.<|endoftext|>\n<|user|>\nWhy?\n<|assistant|>\n",
        "Because.<|endoftext|>",
        "<|endoftext|>", "<|endoftext|>", ("<|endoftext|>",), True,
    ),
    "command-r-like": Family(
        "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|><|' + {'user': 'USER', "
        "'assistant': 'CHATBOT', 'system': 'SYSTEM'}[m['role']] + '_TOKEN|>' + m['content'] "
        "+ '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}",
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi there?<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|>"
        "<|CHATBOT_TOKEN|>Yes.<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Why?<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        "Because.<|END_OF_TURN_TOKEN|>",
        "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", ("<|END_OF_TURN_TOKEN|>",), True,
    ),
}  # fmt: skip

TURNS = [
    {"role": "user", "content": "Hi there?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Why?"},
]


def example(*answers, turns=TURNS):
    completions = tuple([{"role": "assistant", "content": answer}] for answer in answers)
    return Example(turns, completions, None, "x:1")


@pytest.fixture(scope="session")
def tokenizer_of(byte_bpe):
    def build(family):
        return byte_bpe(
            special_tokens=SPECIAL_TOKENS,
            bos=family.bos,
            eos=family.eos,
            pad=family.eos,
            adds_bos=family.adds_bos,
            chat_template=family.template,
        )

    return build


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_tokens_are_the_rendered_conversation_with_one_bos_and_one_stop(tokenizer_of, family):
    tokenizer = tokenizer_of(family)
    stops = tokenizer.convert_tokens_to_ids(list(family.stops))
    tree, drifting_tokens, _ = encode(example("Because.", "Don't know!"), tokenizer, stop_token_ids=stops)

    assert tokenizer.decode(tree.prompt_ids) == family.prompt
    assert tokenizer.decode(tree.completion_ids[0]) == family.completion
    assert tokenizer.decode(tree.completion_ids[1]) == family.completion.replace("Because.", "Don't know!")
    assert drifting_tokens == 0

    leading = [token for token in tree.prompt_ids[:2] if token == tokenizer.bos_token_id]
    assert len(leading) == family.prompt.startswith(family.bos)
    for ids in tree.completion_ids:
        assert ids[-1] in stops
        assert sum(token in stops for token in ids) == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_whole_rendering_begins_with_prompt_and_completion(tokenizer_of, name):
    # The template's own text, up to what it writes after the stop.
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family)
    answer = {"role": "assistant", "content": "Because."}
    whole = tokenizer.apply_chat_template([*TURNS, answer], tokenize=False)
    stops = tokenizer.convert_tokens_to_ids(list(family.stops))
    tree, *_ = encode(example("Because."), tokenizer, stop_token_ids=stops)
    decoded = tokenizer.decode([*tree.prompt_ids, *tree.completion_ids[0]])
    if "no stop" in name:
        assert decoded == whole + tokenizer.eos_token
    else:
        assert whole.startswith(decoded)
        assert whole[len(decoded) :].strip() == ("<|endoftext|>" if "EOS after" in name else "")


def test_real_tokenizer_gives_the_rendered_conversation(smollm2):
    stops = [smollm2.eos_token_id]
    tree, drifting_tokens, _ = encode(example("Because.", "No idea"), smollm2, stop_token_ids=stops)
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    assert smollm2.decode(tree.prompt_ids) == system + FAMILIES["chatml"].prompt
    assert [smollm2.decode(ids) for ids in tree.completion_ids] == ["Because.<|im_end|>", "No idea<|im_end|>"]
    assert drifting_tokens == 0


def test_plain_text_is_joined_as_it_is(byte_bpe):
    plain = Example("Q:", (" a", "b"), None, "x:1")
    assert render(plain, byte_bpe()) == ("Q:", ("Q: a", "Q:b"), ())


def test_conversation_without_template_names_the_option(byte_bpe):
    with pytest.raises(
        ConfigError, match=r"x:1: the row is a conversation, .* set model\.chat_template to a file or a Jinja"
    ):
        render(example("a"), byte_bpe())


def test_template_that_refuses_a_turn_is_an_error_of_the_row(tokenizer_of):
    turns = [{"role": "system", "content": "s"}, *TURNS]
    for name in ("gemma", "mistral"):
        with pytest.raises(DataError, match=r"x:1: the chat template refuses the turns \(system user assistant user"):
            render(example("a", turns=turns), tokenizer_of(FAMILIES[name]))


def test_template_with_a_mistake_is_an_error_of_the_configuration(byte_bpe):
    with pytest.raises(ConfigError, match=r"chat template is not valid Jinja \(line 2: .*set model\.chat_template"):
        render(example("a"), byte_bpe(chat_template="x\n{% if %}"))
