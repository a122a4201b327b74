import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_mask, flex_attention

from falign.scoring import PromptTree, TreeMask, TreeSpan, pack
from falign.scoring.tree_attention import _block_mask, is_long

TREES = [
    PromptTree((5, 6, 7), ((8, 9, 2), (10, 2))),
    PromptTree((11,), ((12, 2), (13, 14, 15, 16, 2), (2,))),
    PromptTree((17, 18, 19, 20, 21, 2, 22), ((2, 2),)),
]


def mask_of(batch, window=None):
    return TreeMask.of(batch.spans, shape=tuple(batch.input_ids.shape), device=torch.device("cpu"), window=window)


def ancestors(batch):
    """Who sees whom, found by walking: each token's path is its prompt and its own completion up to itself."""
    rows, columns = batch.input_ids.shape
    seen = torch.eye(columns, dtype=torch.bool).repeat(rows, 1, 1)
    for span in batch.spans:
        prompt = list(range(span.start, span.start + span.prompt_length))
        begin = span.start + span.prompt_length
        paths = [prompt]
        for length in span.completion_lengths:
            paths.append(prompt + list(range(begin, begin + length)))
            begin += length
        for path in paths:
            for depth, column in enumerate(path):
                seen[span.row, column, path[: depth + 1]] = True
    return seen[:, None]


@pytest.mark.parametrize("row_tokens", [None, 15])
def test_a_token_sees_its_prompt_and_its_own_completion(row_tokens):
    batch = pack(TREES, pad_token_id=0, row_tokens=row_tokens, pad_to_multiple_of=4)
    assert torch.equal(mask_of(batch).dense(), ancestors(batch))


def test_a_window_counts_positions_on_the_path_and_not_columns():
    batch = pack(TREES[:1], pad_token_id=0)
    seen = mask_of(batch, window=3).dense()[0, 0]
    # The second completion begins at column 6, position 3: it sees positions 1 and 2, which are columns 1 and 2.
    assert seen[6].nonzero()[:, 0].tolist() == [1, 2, 6]
    assert seen[7].nonzero()[:, 0].tolist() == [2, 6, 7]


# Completions long enough to be worth a call each: behind a shorter prompt, and behind a longer one.
LONG = [
    PromptTree((5,) * 9, ((6,) * 120, (7,) * 90, (8,) * 5, (9,) * 80)),
    PromptTree((5,) * 50, ((6,) * 90, (7,) * 30, (8,) * 80, (9,) * 75)),
]


def test_only_long_completions_are_attended_one_by_one():
    assert [is_long(span) for span in pack(TREES, pad_token_id=0).spans] == [False] * 3
    assert [is_long(span) for span in pack(LONG, pad_token_id=0).spans] == [True] * 2
    for shape in (((1,) * 2000, ((1,) * 300, (1,) * 300)), ((1,) * 100, ((1,) * 10,) * 16)):
        assert not is_long(pack([PromptTree(*shape)], pad_token_id=0).spans[0])


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("trees", "row_tokens"), [(TREES, None), (TREES, 15), (LONG, None), (LONG + TREES, 400)])
@pytest.mark.parametrize("gqa", [False, True])
def test_attention_by_trees_is_attention_with_the_mask_written_out(window, trees, row_tokens, gqa):
    batch = pack(trees, pad_token_id=0, row_tokens=row_tokens, pad_to_multiple_of=4)
    mask, (rows, columns) = mask_of(batch, window), batch.input_ids.shape
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, heads, columns, 8) for heads in ((4, 2, 2) if gqa else (2, 2, 2))]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    used = torch.zeros(rows, columns, dtype=torch.bool)
    for span in batch.spans:
        used[span.row, span.start : span.start + span.length] = True

    mine = F.scaled_dot_product_attention(*inputs, attn_mask=mask, scale=0.3, enable_gqa=gqa)
    whole = F.scaled_dot_product_attention(*inputs, attn_mask=mask.dense(), scale=0.3, enable_gqa=gqa)
    weights = torch.randn(mine.shape, generator=generator, dtype=torch.float64) * used[:, None, :, None]
    torch.testing.assert_close(mine.transpose(1, 2)[used], whole.transpose(1, 2)[used], rtol=0, atol=1e-12)
    assert (mine.transpose(1, 2)[~used] == 0).all()
    gradients = [torch.autograd.grad((out * weights).sum(), inputs) for out in (mine, whole)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 3])
def test_the_block_mask_of_flex_attention_is_the_same_rule(window):
    batch = pack(TREES, pad_token_id=0, row_tokens=15, pad_to_multiple_of=4)
    mask, (rows, columns) = mask_of(batch, window), batch.input_ids.shape
    block = _block_mask(mask)
    written = create_mask(block.mask_mod, rows, 1, columns, columns, device="cpu")
    inside = torch.zeros(rows, columns, dtype=torch.bool)
    for span in batch.spans:
        inside[span.row, span.start : span.start + span.length] = True
    both = inside[:, None, :, None] & inside[:, None, None, :]
    assert torch.equal(written & both, mask.dense() & both)
    assert not (written & ~inside[:, None, None, :] & inside[:, None, :, None]).any()

    query = torch.randn(rows, 2, columns, 16)
    flex = flex_attention(query, query, query, block_mask=block)
    mine = F.scaled_dot_product_attention(query, query, query, attn_mask=mask)
    torch.testing.assert_close(flex.transpose(1, 2)[inside], mine.transpose(1, 2)[inside], rtol=0, atol=1e-5)


def test_the_mask_for_eager_attention_is_additive():
    mask = mask_of(pack(TREES, pad_token_id=0))
    additive = mask.additive(torch.float32)
    assert additive.dtype == torch.float32
    assert torch.equal(additive == 0, mask.dense())
    assert additive.min() == torch.finfo(torch.float32).min


def test_nothing_of_the_size_of_a_row_squared_is_made():
    long = PromptTree(tuple(range(300)), ((1,) * 20, (2,) * 30))
    batch = pack([long] * 8, pad_token_id=0)
    mask, columns = mask_of(batch), batch.input_ids.shape[1]
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(t))
            return out

    query = torch.randn(1, 1, columns, 4)
    with Sizes():
        F.scaled_dot_product_attention(query, query, query, attn_mask=mask)
    assert max(sizes) <= 350 * 350
    assert columns == 2800


def test_other_uses_of_the_mask_and_dropout_are_refused():
    mask = mask_of(pack(TREES, pad_token_id=0))
    with pytest.raises(TypeError, match="only with scaled_dot_product_attention"):
        mask.float()
    query = torch.randn(1, 1, mask.columns, 4)
    with pytest.raises(ValueError, match=r"dropout_p=0.1.*padded layout"):
        F.scaled_dot_product_attention(query, query, query, attn_mask=mask, dropout_p=0.1)


def test_a_span_knows_its_length_and_depth():
    span = TreeSpan(row=0, start=4, prompt_length=3, completion_lengths=(2, 5), counted=(None, None))
    assert (span.length, span.depth) == (10, 8)
