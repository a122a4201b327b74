#!/usr/bin/env bash
# From a fresh clone to an aligned LoRA adapter: install, look at the data, train, evaluate, export, show.
cd "$(dirname "$0")/.."
source scripts/environment.sh demo
run=runs/quickstart
if [ -e "$run" ]; then
    rm -rf "$run.previous"
    mv "$run" "$run.previous"
    echo "the last run is now $run.previous"
fi
.venv/bin/falign data check demo:polite-preference --model demo:smollm2-135m-instruct
.venv/bin/falign train configs/quickstart.yaml > /dev/null # the table comes last
.venv/bin/falign export "$run" --format adapter
.venv/bin/falign report "$run"
