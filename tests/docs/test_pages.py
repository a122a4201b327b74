"""The pages are run: every Python block, what it prints, the tables of formulas, and every relative link."""

import contextlib
import io
import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch

from falign import divergences
from falign.divergences.registry import DIVERGENCES

ROOT = Path(__file__).parents[2]
PAGES = sorted(ROOT.glob("docs/**/*.md")) + [
    page for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md") if page.is_file()
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

PARAMETER_VALUES = {"alpha": (-1.5, -0.4, 0.3, 0.7, 1.4), "generalized_js": (0.2, 0.9)}
LOG_U = torch.tensor([-4.0, -1.0, -0.1, 0.2, 1.5, 5.0], dtype=torch.float64)
SYMBOLS = {"−": "-", "·": "*", "^": "**", "∞": "inf", "α": "a", "≥": ">=", "√": "sqrt"}
NAMES = {"inf": math.inf, "log": torch.log, "exp": torch.exp, "sqrt": torch.sqrt, "sign": torch.sign, "abs": torch.abs}


def relative(page):
    return str(page.relative_to(ROOT))


@pytest.fixture(params=PAGES, ids=relative)
def page(request):
    return request.param


# PEFT 0.21 and TRL 1.16 use names that Transformers 5.23 has replaced.
@pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # no accelerator
def test_python_blocks_run_and_print_what_the_page_says(page, tmp_path, monkeypatch):
    """Blocks share one namespace; a ``text`` block right after a Python block is what that block prints."""
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    blocks = list(FENCE.finditer(text))
    namespace = {"__name__": relative(page), **given(page, tmp_path)}
    for i, block in enumerate(blocks):
        if block[1] != "python":
            continue
        line = text.count("\n", 0, block.start(2))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * line + block[2], str(page), "exec"), namespace)
        following = blocks[i + 1] if i + 1 < len(blocks) else None
        if following is not None and following[1] == "text" and not text[block.end() : following.start()].strip():
            assert lines(printed.getvalue()) == lines(following[2]), f"{relative(page)}:{line}"


def lines(text):
    return [line.rstrip() for line in text.strip().splitlines()]


def given(page, folder):
    """What the reader of a page has before its first block."""
    if page.name == "scoring.md":
        write_scores(folder)
    if page.name == "trl.md":
        from tests.models.tiny import save_tiny

        save_tiny(folder / "my-model")
    if page.name != "data.md":
        return {}
    rows = [{"prompt": f"Name color {i}.\n", "chosen": "Blue, gladly.", "rejected": "Blue."} for i in range(60)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"tokenizer": byte_tokenizer()}


def write_scores(folder):
    from falign.data import DataSource, Window
    from falign.evaluation import ScoreOutput, TreeStream, score_trees
    from tests.evaluation.scoring import tiny_scorer
    from tests.models.tiny import tiny_tokenizer
    from tests.training.pairs import write_pairs

    source = DataSource(str(write_pairs(folder / "pairs.jsonl", n=6)), chat=False)
    trees = TreeStream(source, tiny_tokenizer(), stop_token_ids={1}, window=Window(64))
    with ScoreOutput(folder / "scores.jsonl", record={}) as output:
        score_trees(trees, tiny_scorer(), output, tokens_per_batch=64)


def byte_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["</s>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def test_relative_links_resolve(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{relative(page)} links to {target}"
        assert not anchor or anchor in anchors(file), f"{relative(page)} links to {target}"


def test_the_table_of_members_names_files_and_lists_that_exist():
    """``NAME`` in ``path.py``: of CONTRIBUTING.md, relative to the package or to its tests."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## Adding a member")[2].partition("\n## ")[0]
    pairs = re.findall(r"`([A-Za-z_]+)` (?:in|of) `([\w/]+\.py)`", section)
    assert len(pairs) > 12
    folders = (ROOT / "falign", ROOT / "tests", ROOT / "falign/evaluation/benchmarks")
    for name, path in pairs:
        files = [folder / path for folder in folders if (folder / path).is_file()]
        assert files, f"CONTRIBUTING.md names {path}"
        assert any(re.search(rf"^(?:def )?{name}\b", file.read_text("utf-8"), re.MULTILINE) for file in files), name
    for path in re.findall(r"`([\w/]+(?:\.py|/))`", section):
        assert any((folder / path).exists() for folder in (*folders, ROOT)), f"CONTRIBUTING.md names {path}"


def anchors(page):
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table(*header):
    """Rows of the table of divergences.md that has this header, by column."""
    text = (ROOT / "docs/divergences.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    body = itertools.takewhile(bool, rows[rows.index(list(header)) + 2 :])
    return [dict(zip(header, row, strict=True)) for row in body]


def members(name_cell):
    """A family with its parameter at several values: (divergence, names that its formulas may use)."""
    name = re.fullmatch(r"`(\w+)(?:\(.*\))?`", name_cell)[1]
    if name not in PARAMETER_VALUES:
        return [(divergences.get(name), {})]
    values = PARAMETER_VALUES[name]
    return [(divergences.get(f"{name}({v})"), {"a": v, "b": v}) for v in values]


def evaluate(cell, **names):
    for symbol, spelling in SYMBOLS.items():
        cell = cell.replace(symbol, spelling)
    tensors = {key: torch.as_tensor(value, dtype=torch.float64) for key, value in names.items()}
    cell = re.sub(r"\b(log)\((\d+)\)", r"log(torch.tensor(\2., dtype=torch.float64))", cell)
    return torch.as_tensor(eval(cell, {"torch": torch, **NAMES, **tensors}), dtype=torch.float64)


def assert_same(cell, actual, **names):
    expected = evaluate(cell, **names)
    actual = torch.as_tensor(actual, dtype=torch.float64)
    torch.testing.assert_close(actual, expected.expand_as(actual), rtol=1e-9, atol=1e-12, msg=lambda m: f"{cell}: {m}")


FAMILIES = ("name", "f(u)", "f'(u)", "f'(0⁺)", "f'(∞)", "f''(1)", "barrier")
INVERSES = ("name", "`exp(f_prime_inverse(y))`", "`conjugate(y)`")
WEIGHTS = ("name", "u·f''(u)", "u → 0", "u → ∞")


@pytest.mark.parametrize("row", table(*FAMILIES), ids=lambda row: row["name"])
def test_table_of_families(row):
    for divergence, parameter in members(row["name"]):
        u = LOG_U.exp()
        assert_same(row["f(u)"], divergence.f(LOG_U), u=u, **parameter)
        assert_same(row["f'(u)"], divergence.f_prime(LOG_U), u=u, **parameter)
        assert_same(row["f'(0⁺)"], divergence.f_prime_at_zero, **parameter)
        assert_same(row["f'(∞)"], divergence.f_prime_at_infinity, **parameter)
        if row["f''(1)"] == "–":
            assert math.isnan(divergence.second_derivative_at_one)
        else:
            assert_same(row["f''(1)"], divergence.second_derivative_at_one, **parameter)
        barrier = {"yes": True, "no": False}
        stated = barrier[row["barrier"]] if row["barrier"] in barrier else evaluate(row["barrier"], **parameter).item()
        assert divergence.has_barrier == stated


@pytest.mark.parametrize("row", table(*INVERSES), ids=lambda row: row["name"])
def test_table_of_inverses_and_conjugates(row):
    inverse, conjugate = (row[column] for column in INVERSES[1:])
    for divergence, parameter in members(row["name"]):
        y = divergence.f_prime(LOG_U[:5])
        assert_same(inverse, divergence.f_prime_inverse(y).exp(), y=y, **parameter)
        assert_same(conjugate, divergence.conjugate(y), y=y, **parameter)


@pytest.mark.parametrize("row", table(*WEIGHTS), ids=lambda row: row["name"])
def test_table_of_weights(row):
    weight, at_zero, at_infinity = (row[column] for column in WEIGHTS[1:])
    for divergence, parameter in members(row["name"]):
        log_u = LOG_U.clone().requires_grad_()
        (slope,) = torch.autograd.grad(divergence.f_prime(log_u).sum(), log_u)
        assert_same(weight, slope, u=LOG_U.exp(), **parameter)
        for end, u in ((at_zero, 1e-300), (at_infinity, 1e300)):
            limit = evaluate(end, **parameter).item()
            value = evaluate(weight, u=u, **parameter).item()
            assert value > 1e50 if math.isinf(limit) else value == pytest.approx(limit, rel=1e-9, abs=1e-50)


def test_tables_name_every_family_and_alias():
    named = [re.match(r"`(\w+)", row["name"])[1] for row in table(*FAMILIES)]
    assert named == list(divergences.names())
    assert [re.match(r"`(\w+)", row["name"])[1] for row in table(*WEIGHTS)] == named
    rows = table("name", "is", "aliases")
    stated = {alias: row["name"].strip("`") for row in rows for alias in re.findall(r"`(\w+)`", row["aliases"])}
    assert stated == DIVERGENCES.aliases


def test_the_page_of_measures_lists_each_with_its_arguments():
    import inspect

    from falign.objectives.measures import MEASURES

    table = (ROOT / "docs" / "measures.md").read_text(encoding="utf-8")
    for name in MEASURES.names():
        arguments = ", ".join(inspect.signature(MEASURES.get(name)).parameters)
        listed = f"`{name}({arguments.replace('divergence,', 'f,')})`" if arguments else f"`{name}`"
        assert f"| {listed} |" in table, listed
