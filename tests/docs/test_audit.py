"""The figures of docs/audit.md are those that the audit computes."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_tables_of_the_audit_are_computed():
    script = runpy.run_path(str(ROOT / "scripts" / "audit_table.py"))
    page = (ROOT / "docs" / "audit.md").read_text(encoding="utf-8")
    assert script["written"](page) == page, "python scripts/audit_table.py --write"
    assert page.count("\n| `") >= 90
