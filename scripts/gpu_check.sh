#!/usr/bin/env bash
# Everything of falign that needs a GPU, in under 9 minutes: scripts/gpu_check.sh [--dry-run] [--out gpu.json]
# From a bare checkout with torch, transformers, peft, accelerate and triton; PYTHON names the interpreter.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "${PYTHON:-python3}" "$root/scripts/gpu_check.py" "$@"
