"""The tables of docs/audit.md, computed: `python scripts/audit_table.py`, or `--write` to put them into the page."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import falign
from falign.audit import CASES
from falign.audit.result import drawn_cosine, level_name, noun

PAGE = Path(__file__).parents[1] / "docs" / "audit.md"
GROUPS = {
    "TRL": ("trl:",),
    "Estimators of the KL": ("kl:",),
    "Papers": tuple(
        f"{each}:"
        for each in (
            *("dphrl", "correlated_proxies", "tcod", "gopd", "kdrl", "oreal", "safe", "superhf", "tsdkd", "sft"),
            *("chipo", "hdpo", "simpo"),
        )
    ),
    "falign": ("falign:",),
}


def found(result) -> str:
    """The finding in a few words."""
    best = result.best
    if result.finding == "zero":
        return "zero"
    name = f"{noun(best)} {level_name(best)}"
    if result.finding == "none":
        sums = [note for note in result.notes if note.startswith("It is ")]
        return (
            sums[0].removeprefix("It is ").rstrip(".") if sums else f"none; nearest {name}, {drawn_cosine(best.cosine)}"
        )
    if result.finding == "direction":
        return f"direction of {name}"
    return name if result.samples == "pairs" or abs(best.ratio - 1) < 1e-9 else f"{best.ratio:.4g} × {name}"


def claimed(result) -> str:
    """The divergence that it is meant for, and the cosine with it at the level that fits best."""
    if result.named is None:
        return "– | –"
    rows = [row for row in result.table if row.divergence == result.named]
    cosine = drawn_cosine(max(row.cosine for row in rows)) if rows else "0"
    return f"{result.named} | {cosine}"


def tables() -> dict[str, str]:
    """Each table of the page, by its title."""
    made = {}
    for title, prefixes in GROUPS.items():
        rows = ["| loss | it is | samples | meant for | cosine | has the gradient of |", "|---|---|---|---|---|---|"]
        for name, case in CASES.items():
            if name.startswith(prefixes):
                result = falign.audit(name)
                rows.append(f"| `{name}` | {case.about} | {result.samples} | {claimed(result)} | {found(result)} |")
        made[title] = "\n".join(rows)
    rows = ["| f | in the reward | as a loss |", "|---|---|---|"]
    for name in CASES:
        if name.startswith("value:") and name.endswith("_reward"):
            f = name.removeprefix("value:").removesuffix("_reward")
            cosines = [falign.audit(f"value:{f}_{use}").row(f, "sequence").cosine for use in ("reward", "loss")]
            rows.append(f"| {f} | {' | '.join(drawn_cosine(each) for each in cosines)} |")
    made["Value estimates"] = "\n".join(rows)
    return made


def written(page: str) -> str:
    """The page with its tables replaced by computed ones."""
    for title, table in tables().items():
        pattern = rf"<!-- {re.escape(title)} -->.*?<!-- end -->"
        assert re.search(pattern, page, re.DOTALL), title
        between = f"<!-- {title} -->\n\n{table}\n\n<!-- end -->"
        page = re.sub(pattern, lambda _, between=between: between, page, count=1, flags=re.DOTALL)
    return page


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write them into docs/audit.md")
    if parser.parse_args().write:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        for title, table in tables().items():
            print(f"\n{title}\n\n{table}")
