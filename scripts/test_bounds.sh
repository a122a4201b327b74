#!/usr/bin/env bash
# Installs the lowest (floor) or the highest (newest) versions that pyproject.toml allows into a throw-away environment,
# and runs scripts/bounds_smoke.py there. Further arguments go to pip, as a requirement that names a PyTorch build.
# usage: scripts/test_bounds.sh floor|newest [torch==2.13.0+cpu]
set -euo pipefail
cd "$(dirname "$0")/.."
which="${1:-}"
case "$which" in
    floor | newest) shift ;;
    *) echo "usage: scripts/test_bounds.sh floor|newest [REQUIREMENT ...]" >&2; exit 2 ;;
esac
python="${PYTHON:-python3}"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/environment"
"$folder/environment/bin/python" -m pip install --quiet --disable-pip-version-check packaging
[ "$which" = newest ] || "$folder/environment/bin/python" scripts/bound_constraints.py > "$folder/constraints.txt"
touch "$folder/constraints.txt"
"$folder/environment/bin/python" -m pip install --quiet --disable-pip-version-check -c "$folder/constraints.txt" . "$@"
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false "$folder/environment/bin/python" scripts/bounds_smoke.py
"$folder/environment/bin/python" -m pip list --disable-pip-version-check | grep -iE '^(torch|transformers|trl|peft|accelerate|datasets|numpy) '
