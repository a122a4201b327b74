"""The page of results: its commands can be run, and what it says of settings and of its own figures is true."""

import re
import shlex
from pathlib import Path

import pytest

from falign import divergences
from falign.objectives import dph_rl_coefficient
from falign.runfile import load_run_file

ROOT = Path(__file__).parents[2]
RESULTS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
DPH_RL = (ROOT / "docs" / "dph-rl.md").read_text(encoding="utf-8")
NAMES = {
    "reverse KL": "reverse_kl",
    "Jensen–Shannon": "jensen_shannon",
    "α = 0.5": "alpha(0.5)",
    "forward KL": "forward_kl",
    "Jeffreys": "jeffreys",
    "squared Hellinger": "squared_hellinger",
    "Neyman χ²": "neyman_chi2",
    "χ² + KL": "chi2_kl",
    "generalized JS, 0.3": "generalized_js(0.3)",
}
SEEDS = "### DPH-RL at the published coefficient"
AT_ONE_STRENGTH = "### The paper's four on HH, at one strength"
TDPO = "### TDPO beside DPO on HH"


def commands():
    """Return the words of each indented command that names a run file."""
    code = "\n".join(line[4:] for line in RESULTS.split("\n") if line.startswith("    "))
    lines = code.replace("\\\n", " ").replace("DIVERGENCE", "forward_kl").split("\n")
    found = [shlex.split(line, comments=True) for line in lines]
    return [words for words in found if any(map(is_run_file, words))]


def is_run_file(word):
    return word.startswith("configs/") and "/rewards/" not in word


def section(title):
    return re.split(r"^#", RESULTS.split(title)[1], maxsplit=1, flags=re.MULTILINE)[0]


def tables(text):
    """Return each table as a list of rows of cells, the heading first."""
    found = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    rows = [[[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()] for table in found]
    return [[table[0], *table[2:]] for table in rows]


def test_the_page_has_commands():
    assert len(commands()) >= 15


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_names_a_run_file_and_fields_that_exist(words):
    (file,) = filter(is_run_file, words)
    overrides = [word for word in words if re.match(r"[a-z_.0-9]+=", word)]
    load_run_file(ROOT / file, overrides).check()
    for word in words:
        assert not word.startswith(("configs/", "scripts/")) or (ROOT / word).is_file()


def test_the_coefficients_of_dph_rl_on_the_pages_are_the_published_ones():
    objective = load_run_file(ROOT / "configs" / "dphrl-arithmetic.yaml").check()
    published = {name: dph_rl_coefficient(divergences.get(name)) for name in ("forward_kl", "jensen_shannon")}
    assert objective.coefficient == published["forward_kl"]
    assert f"coefficient of {published['forward_kl']}" in section(SEEDS)
    assert not re.search(r"coefficient=", section(SEEDS))
    (defaults,) = (table for table in tables(DPH_RL) if table[0][-1] == "default")
    assert [float(row[-1]) for row in defaults[1:3]] == [published["jensen_shannon"], published["forward_kl"]]


def test_means_and_ranges_over_seeds_are_those_of_the_rows():
    heading, *rows = tables(section(SEEDS))[0]
    assert heading[:2] == ["seed", "step"]
    means = [row for row in rows if row[0].startswith("mean")]
    assert means
    for mean in means:
        seeds = [row for row in rows if row[1] == mean[1] and row[0].isdigit()]
        assert len(seeds) == {"mean of two (range)": 2, "mean of three (range)": 3}[mean[0]]
        for column in range(2, len(heading)):
            values = [float(row[column]) for row in seeds]
            mean_of, least, most = re.findall(r"[\d.]+", mean[column])
            assert (float(least), float(most)) == (min(values), max(values))
            rounding = 10.0 ** -len(mean_of.partition(".")[2])  # half of it in the mean, half in the rows
            assert float(mean_of) == pytest.approx(sum(values) / len(values), abs=rounding)
    assert f"| {means[-1][1]} | {len(seeds)} | {' | '.join(means[-1][2:6])} |" in DPH_RL


def test_every_divergence_is_shown_with_its_scale_or_standardized():
    (own,) = (table for table in tables(RESULTS) if "f″(1)" in table[0])
    assert len(own) - 1 == 9
    assert own[0][1] == "f″(1)"
    for name, scale, *_ in own[1:]:
        assert float(scale) == divergences.get(NAMES[name]).second_derivative_at_one
    for name, *_ in tables(section(AT_ONE_STRENGTH))[0][1:]:
        standardized = name.endswith(", standardized")
        assert standardized != (divergences.get(NAMES[name.split(", ")[0]]).second_derivative_at_one == 1)
    assert "--own-scale" not in section(AT_ONE_STRENGTH)


def test_tdpo_is_measured_beside_dpo_on_the_same_pairs():
    heading, *rows = tables(section(TDPO))[0]
    assert [row[0] for row in rows] == ["DPO", "TDPO1", "TDPO2"]
    dpo, (columns, reverse_kl, *_) = dict(zip(heading, rows[0], strict=True)), tables(section(AT_ONE_STRENGTH))[0]
    for column, value in list(zip(columns, reverse_kl, strict=True))[1:]:
        assert dpo[column] == value
    variants = [words for words in commands() if "objective.kind=token_pairwise" in words]
    assert [words[-1] for words in variants] == ["objective.variant=1", "objective.variant=2"]
    page = (ROOT / "docs" / "which-divergence.md").read_text(encoding="utf-8")
    assert "measured by us" not in page
