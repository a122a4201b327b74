#!/usr/bin/env bash
# Runs the tests of falign.integrations.trl against another TRL: the lowest that pyproject.toml allows (floor), the newest,
# or a version. It is installed once, into .venv/trl, without its dependencies. Further arguments go to pytest.
# usage: scripts/test_trl.sh floor|newest|VERSION [PYTEST ARGUMENT ...]
set -euo pipefail
cd "$(dirname "$0")/.."
which="${1:?usage: scripts/test_trl.sh floor|newest|VERSION [PYTEST ARGUMENT ...]}"
shift
python=.venv/bin/python
case "$which" in
    floor) which="$("$python" scripts/bound_constraints.py | sed -n 's/^trl==//p')" ;;
    newest) rm -rf .venv/trl/newest ;;
esac
folder="$PWD/.venv/trl/$which"
if [ ! -e "$folder/trl" ]; then
    requirement="trl==$which"
    [ "$which" != newest ] || requirement=trl
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder.part" "$requirement"
    mv "$folder.part" "$folder"
fi
export PYTHONPATH="$folder" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
"$python" -c 'import trl; print("trl", trl.__version__, "in", trl.__path__[0])'
exec "$python" -m pytest -q tests/integrations/trl "$@"
