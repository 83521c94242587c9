#!/usr/bin/env bash
# A GPU's first quarter of an hour, in two calls (docs/performance.md, "On a GPU"):
#
#     benchmarks/gpu/run.sh check   [OUT]     is it right? at most 230 s
#     benchmarks/gpu/run.sh measure [OUT]     how fast is it? at most 520 s
#     benchmarks/gpu/run.sh check OUT --small                 tiny shapes without a GPU, to try it
#
# OUT is the environment variable of that name unless given, and gets CALL-CARD.json and .tar.gz.
# Needs this folder's checkout, a Python with torch (PYTHON, else python3), and the wheels that
# `benchmarks/gpu/wheels.sh` collected for it; no network, no virtual environment.
set -euo pipefail
BEGAN=$(date +%s)
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
# Poisoned memory comes with PyTorch's deterministic mode, in which cuBLAS asks for this.
export CUBLAS_WORKSPACE_CONFIG=${CUBLAS_WORKSPACE_CONFIG:-:4096:8}
WHEELS=${WHEELS:-.wheels}
if compgen -G "$WHEELS/*.whl" >/dev/null; then
  SITE=$(mktemp -d)
  trap 'rm -rf "$SITE"' EXIT
  "$PYTHON" -m pip --disable-pip-version-check install -q --no-index --no-deps --no-compile \
    --no-cache-dir --target "$SITE" "$WHEELS"/*.whl
  PYTHONPATH=$PYTHONPATH:$SITE
fi
# In the background and waited for, so that a signal to this shell reaches it at once.
"$PYTHON" -m benchmarks.gpu "$@" --began "$BEGAN" &
CHILD=$!
trap 'kill -TERM "$CHILD" 2>/dev/null || true' TERM INT
while true; do
  wait "$CHILD" && CODE=0 || CODE=$?
  kill -0 "$CHILD" 2>/dev/null || exit "$CODE"  # else a signal came, and it is ending
done
