#!/usr/bin/env bash
# Everything that CI runs: install, lint, format, types, tests with doctests, and those of TRL against its oldest release.
# Arguments go to pytest.
cd "$(dirname "$0")/.."
source scripts/environment.sh dev
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
.venv/bin/ruff check
.venv/bin/ruff format --check
.venv/bin/basedpyright
OMP_NUM_THREADS=1 .venv/bin/pytest -n 2 --dist loadfile "$@"
[ $# -gt 0 ] || scripts/test_trl.sh floor
