import pytest

from falign.data.splits import draw, held_out_prompts
from falign.errors import ConfigError

PROMPTS = [f"p{i}" for i in range(1000)]


def places(name, count):
    return [f"{name}:{i}" for i in range(count)]


def test_draw_gives_the_shares_without_repetition():
    rows = draw([places("a", 300), places("b", 100), places("c", 1000)], [0.5, 0.2, 0.3], seed=1)
    assert [len(part) for part in rows] == [250, 100, 150]  # b runs out first, at 100 / 0.2 = 500 rows
    assert all(part == sorted(set(part)) for part in rows)


def test_draw_is_spread_over_the_source_and_depends_on_seed_and_row_alone():
    def drawn(seed, count=300):
        return set(draw([places("a", count), places("b", 50)], [0.5, 0.5], seed=seed)[0])

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert max(drawn(1)) > 200
    # Of the rows drawn from a longer file, those that were there before had been drawn from the shorter one.
    assert {i for i in drawn(1, count=600) if i < 300} <= drawn(1)


def test_fraction_holds_out_about_that_share_and_more_rows_do_not_reshuffle():
    held_out = held_out_prompts(PROMPTS, fraction=0.2, seed=3)
    assert 160 <= len(held_out) <= 240
    assert held_out_prompts(PROMPTS[:500], fraction=0.2, seed=3) == held_out & set(PROMPTS[:500])
    assert held_out_prompts(PROMPTS, fraction=0.2, seed=4) != held_out


def test_size_holds_out_so_many_rows_and_whole_prompts():
    assert len(held_out_prompts(PROMPTS, size=37, seed=0)) == 37
    doubled = PROMPTS + PROMPTS
    held_out = held_out_prompts(doubled, size=37, seed=0)
    assert sum(prompt in held_out for prompt in doubled) == 36


def test_nothing_is_held_out_unless_asked():
    assert held_out_prompts(PROMPTS, seed=0) == frozenset()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 1.0}, r"eval_fraction=1.0 must be in \[0, 1\)"),
        ({"fraction": 0.1, "size": 2}, "and one of them 0"),
        ({"size": -1}, "eval_size=-1 at least 0"),
        ({"size": 1000}, "leaves nothing for training: there are 1000 rows with 1000 different prompts"),
        ({"fraction": 1e-9}, "leaves nothing for evaluation"),
    ],
)
def test_impossible_splits_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        held_out_prompts(PROMPTS, seed=0, **options)
