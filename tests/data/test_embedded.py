"""The samples in the package are what their README says."""

import difflib
import gzip
import json

import pytest

import falign.data
from falign.data import DEMOS, read_rows
from falign.errors import DataError

RUDE = {"damn", "crap", "freaking", "hell", "stupid", "idiot", "dumb", "ass", "bloody", "shit", "fuck", "sucks"}


def read(path):
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return list(lines)


def is_selected(row, seen):
    chosen, rejected = (row[name].lower().split() for name in ("chosen", "rejected"))
    letters = "".join(c if c.isalnum() else " " for c in (row["chosen"] + " " + row["rejected"]).lower())
    return (
        (row["instruction"], row["input"]) not in seen
        and min(len(chosen), len(rejected)) >= 3
        and max(len(chosen), len(rejected)) <= 30
        and difflib.SequenceMatcher(None, chosen, rejected, autojunk=False).ratio() < 0.7
        and not RUDE & set(letters.split())
    )


def test_sample_is_the_selection_that_its_readme_describes(shared_data):
    seen, lines = set(), []
    for line in read(shared_data("polite-preference/instruction_preference.jsonl.gz")):
        row = json.loads(line)
        if is_selected(row, seen):
            seen.add((row["instruction"], row["input"]))
            lines.append(line)
    assert read(DEMOS["demo:polite-preference"]) == lines[:400]


def test_sample_carries_its_licence_and_source():
    folder = DEMOS["demo:polite-preference"].parent
    assert "Apache License" in (folder / "LICENSE.polite-preference.txt").read_text(encoding="utf-8")
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert "28c65cdfbc3338e2e040016eea4b7fdf556e4d57" in readme
    assert all(word in readme for word in RUDE)


def test_arithmetic_is_all_sums_differences_and_products_of_two_digits():
    results = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    rows = [
        {"question": f"{a} {sign} {b}", "answer": str(result(a, b))}
        for a in range(10)
        for b in range(10)
        for sign, result in results.items()
    ]
    assert len(rows) == 300
    for split, expected in (("test", rows[::13]), ("train", [row for i, row in enumerate(rows) if i % 13])):
        assert [row.fields for row in read_rows("demo:one-digit-arithmetic", split=split)] == expected


def test_a_split_that_the_arithmetic_lacks_is_refused_by_the_sample_s_name():
    with pytest.raises(DataError, match="demo:one-digit-arithmetic: no data file is named after the split 'dev'"):
        list(read_rows("demo:one-digit-arithmetic", split="dev"))


def test_public_names_exist_and_importing_loads_nothing_heavy():
    import subprocess
    import sys

    assert all(hasattr(falign.data, name) for name in falign.data.__all__)
    code = "import falign.data, sys; print([m for m in ('transformers', 'datasets', 'pyarrow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
