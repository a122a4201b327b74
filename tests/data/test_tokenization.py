import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from falign.data import DataSource, Example, Window, encode, read_examples, tokenize
from falign.errors import ConfigError, DataError

WIDE = Window(max_length=10_000)


def pair(prompt, *completions):
    return Example(prompt, completions, tuple(float(-i) for i in range(len(completions))), "x:1")


def test_prompt_tail_that_merges_goes_to_all_completions(merging):
    tokenizer = merging()
    done = tokenize(pair("xa", "bc", "c"), tokenizer, stop_token_ids=[], window=WIDE)
    assert tokenizer.convert_ids_to_tokens(done.tree.prompt_ids) == ["x"]
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in done.tree.completion_ids] == [
        ["ab", "c", "</s>"],
        ["a", "c", "</s>"],
    ]
    assert done.drifting_tokens == 1
    assert (done.tree.preference, done.tree.place) == ((0.0, -1.0), "x:1")
    # One that merges decides for all, in whatever order they come.
    turned = tokenize(pair("xa", "c", "bc"), tokenizer, stop_token_ids=[], window=WIDE).tree
    assert turned.prompt_ids == done.tree.prompt_ids
    assert turned.completion_ids == done.tree.completion_ids[::-1]


def test_prompt_that_does_not_merge_does_not_drift(merging):
    done = tokenize(pair("xa", "c", "d"), merging(), stop_token_ids=[], window=WIDE)
    assert (len(done.tree.prompt_ids), done.drifting_tokens) == (2, 0)


def test_prompt_that_merges_away_is_refused_unless_a_bos_precedes_it(merging):
    with pytest.raises(DataError, match=r"x:1: no token of the prompt 'a' survives, .*tokenizer that adds a BOS token"):
        encode(pair("a", "b"), merging(), stop_token_ids=[])
    tree, drifting_tokens, _ = encode(pair("a", "b"), merging(adds_bos=True), stop_token_ids=[])
    assert (tree.prompt_ids, tree.completion_ids, drifting_tokens) == ((0,), ((tree.completion_ids[0][0], 1),), 1)


def test_generation_prompt_that_the_answered_conversation_lacks_goes_to_neither_side(byte_bpe):
    # As templates of reasoning models do: "<think>" opens the answer, and is not there once there is one.
    template = (
        "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]<think>\n' }}{% endif %}"
    )
    tokenizer = byte_bpe(chat_template=template)
    turns = [{"role": "user", "content": "Why?"}], ([{"role": "assistant", "content": "Because."}],)
    tree, drifting_tokens, _ = encode(Example(*turns, None, "x:1"), tokenizer, stop_token_ids=[])
    assert tokenizer.decode(tree.prompt_ids) == "[user]Why?\n[assistant]"
    assert tokenizer.decode(tree.completion_ids[0]) == "Because.\n</s>"
    assert drifting_tokens == len(tokenizer("<think>\n")["input_ids"])


@pytest.mark.parametrize(("adds_bos", "prompt"), [(True, "Why?\n"), (True, "<s>Why?\n"), (False, "<s>Why?\n")])
def test_plain_text_has_one_bos_where_the_tokenizer_adds_one_or_the_text_has_it(byte_bpe, adds_bos, prompt):
    tokenizer = byte_bpe(adds_bos=adds_bos)
    tree, drifting_tokens, _ = encode(pair(prompt, "yes", "no"), tokenizer, stop_token_ids=[])
    assert tokenizer.decode(tree.prompt_ids) == "<s>Why?\n"
    assert tree.prompt_ids.count(tokenizer.bos_token_id) == 1
    assert drifting_tokens == 0


def test_plain_text_has_no_bos_where_the_tokenizer_adds_none(byte_bpe):
    tokenizer = byte_bpe()
    tree, *_ = encode(pair("Why?\n", "yes"), tokenizer, stop_token_ids=[])
    assert tokenizer.decode(tree.prompt_ids) == "Why?\n"


@pytest.mark.parametrize(
    ("completion", "want"),
    [
        ("yes", "yes</s>"),
        ("yes \n", "yes \n</s>"),
        ("yes</s>", "yes</s>"),
        ("yes</s>\n", "yes</s>"),
        ("yes<|end|>\n</s> ", "yes<|end|>"),
        ("yes\n<|end|>", "yes\n<|end|>"),
    ],
)
@pytest.mark.parametrize("pad", [None, "</s>", "<|end|>"])
def test_exactly_one_terminal_stop_whatever_the_padding_token(byte_bpe, completion, want, pad):
    tokenizer = byte_bpe(special_tokens=("<s>", "</s>", "<|end|>"), pad=pad)
    stops = tokenizer.convert_tokens_to_ids(["</s>", "<|end|>"])
    tree, *_ = encode(pair("Why?\n", completion), tokenizer, stop_token_ids=stops)
    assert tokenizer.decode(tree.completion_ids[0]) == want


def test_stop_token_inside_a_completion_is_refused(byte_bpe):
    tokenizer = byte_bpe()
    with pytest.raises(
        DataError, match=r"x:1: completion 2 has the stop token '</s>' in its middle \(token 2 of \d+\)"
    ):
        encode(pair("Why?\n", "yes", "n</s>o way"), tokenizer, stop_token_ids=[])


def test_other_special_tokens_inside_a_completion_are_text(byte_bpe):
    tokenizer = byte_bpe(special_tokens=("<s>", "</s>", "<|end|>"))
    tree, *_ = encode(pair("Why?\n", "a<|end|>b"), tokenizer, stop_token_ids=[])
    assert tokenizer.decode(tree.completion_ids[0]) == "a<|end|>b</s>"


def test_tokenizer_without_eos_needs_a_stop_in_the_text(byte_bpe):
    tokenizer = byte_bpe(eos=None)
    with pytest.raises(
        ConfigError, match="x:1: completion 1 has no stop token, and the tokenizer has no EOS to append"
    ):
        encode(pair("Why?\n", "yes"), tokenizer, stop_token_ids=[1])
    assert encode(pair("Why?\n", "yes</s>"), tokenizer, stop_token_ids=[1]).tree.completion_ids[0][-1] == 1


def test_account_of_cuts_and_drops(merging):
    tokenizer = merging(adds_bos=True)
    cut = Window(max_length=8, max_completion_length=4, long_prompt="cut")
    done = tokenize(pair("cdefgh", "ijklm", "no"), tokenizer, stop_token_ids=[], window=cut)
    assert tokenizer.convert_ids_to_tokens(done.tree.prompt_ids) == ["<s>", "f", "g", "h"]
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in done.tree.completion_ids] == [
        list("ijkl"),
        ["n", "o", "</s>"],
    ]
    assert (done.prompt_tokens_cut, done.completions_cut, done.dropped, done.drifting_tokens) == (3, 1, None, 0)

    drop = Window(max_length=8, max_completion_length=4, long_prompt="drop")
    dropped = tokenize(pair("cdefgh", "ijklm", "no"), tokenizer, stop_token_ids=[], window=drop)
    assert (dropped.tree, dropped.dropped) == (None, "long prompt")


TEXT = st.text(
    st.sampled_from("ab c\n.é") | st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=30
)


@given(prompt=TEXT, completions=st.lists(TEXT, min_size=1, max_size=3, unique=True), adds_bos=st.booleans())
@example(prompt=" ", completions=["w"], adds_bos=True)  # the whole prompt merges with the completion
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tokens_are_those_of_the_whole_text(cached_bpe, prompt, completions, adds_bos):
    tokenizer = cached_bpe[adds_bos]
    if not adds_bos:
        prompt = f"Q {prompt}"  # a word that no completion merges with: a prompt that merges away has its own test
    tree, drifting_tokens, _ = encode(pair(prompt, *completions), tokenizer, stop_token_ids=[])
    alone = tokenizer(prompt)["input_ids"]
    assert list(tree.prompt_ids) == alone[: len(alone) - drifting_tokens]
    for ids, completion in zip(tree.completion_ids, completions, strict=True):
        assert [*tree.prompt_ids, *ids[:-1]] == tokenizer(prompt + completion)["input_ids"]
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in ids[:-1]


@given(
    prompt=TEXT,
    completions=st.lists(TEXT, min_size=2, max_size=3, unique=True),
    max_length=st.integers(2, 40),
    own=st.none() | st.integers(1, 39),
    long_prompt=st.sampled_from(["cut", "drop"]),
    long_completion=st.sampled_from(["cut", "drop"]),
)
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_completion_is_ever_empty_and_nothing_exceeds_the_window(
    cached_bpe, prompt, completions, max_length, own, long_prompt, long_completion
):
    window = Window(max_length, own if own is None else min(own, max_length - 1), long_prompt, long_completion)
    tokenizer = cached_bpe[True]
    whole = encode(pair(prompt, *completions), tokenizer, stop_token_ids=[]).tree
    done = tokenize(pair(prompt, *completions), tokenizer, stop_token_ids=[], window=window)
    if done.tree is None:
        assert done.dropped in {"long prompt", "long completion", "equal after the cut"}
        return
    kept, longest = done.tree, max(map(len, done.tree.completion_ids))
    assert len(kept.prompt_ids) + longest <= max_length
    assert longest <= (window.max_completion_length or max_length)
    assert len(set(kept.completion_ids)) == len(completions)
    for ids, before in zip(kept.completion_ids, whole.completion_ids, strict=True):
        assert ids == before[: len(ids)]
        assert (ids[-1] == tokenizer.eos_token_id) == (len(ids) == len(before))
        # The prompt never takes more than its budget from the completions.
        assert len(ids) >= min(len(before), window.max_completion_length or max_length // 2)


@pytest.fixture(scope="session")
def cached_bpe(byte_bpe):
    return {adds_bos: byte_bpe(adds_bos=adds_bos) for adds_bos in (False, True)}


@pytest.mark.parametrize("file", ["hh-rlhf/helpful-base-test.jsonl.gz", "dpo-mix-demo/dpo_en_demo.jsonl.gz"])
def test_published_rows_decode_to_the_rendered_conversation(shared_data, smollm2, file):
    stop = smollm2.eos_token_id
    count = 0
    for row in read_examples(DataSource(str(shared_data(file)))):
        tree, *_ = encode(row, smollm2, stop_token_ids=[stop])
        for ids, turns in zip(tree.completion_ids, row.completions, strict=True):
            want = smollm2.apply_chat_template([*row.prompt, *turns], tokenize=False)
            assert smollm2.decode([*tree.prompt_ids, *ids]) + "\n" == want
            assert ids.count(stop) == 1
        count += 1
        if count == 100:
            break
    assert count == 100
