#!/usr/bin/env bash
# Runs the tests of trackers with wandb, trackio and MLflow, which are installed once into .venv/trackers, beside .venv.
# Further arguments go to pytest.
# usage: scripts/test_trackers.sh [PYTEST ARGUMENT ...]
set -euo pipefail
cd "$(dirname "$0")/.."
folder="$PWD/.venv/trackers"
python="$folder/bin/python"
if [ ! -e "$folder/.installed" ]; then
    .venv/bin/python -m venv --clear --without-pip "$folder"
    # What .venv has is found there, and not installed again.
    places="$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    .venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$places/falign.pth"
    "$python" -m pip install --quiet --disable-pip-version-check trackio wandb mlflow-skinny
    touch "$folder/.installed"
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
exec "$python" -m pytest -q tests/training/test_trackers.py tests/training/online/test_tracker_tables.py "$@"
