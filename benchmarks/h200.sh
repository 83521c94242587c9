#!/usr/bin/env bash
# Everything that docs/performance.md says of a GPU, measured in one run of under nine minutes on an
# H200: checks first, then timings, tables and plots.
#
#     benchmarks/h200.sh OUT                      all parts
#     benchmarks/h200.sh OUT --parts limits,kernels
#     benchmarks/h200.sh OUT --small              small shapes, to try it without a GPU
#
# OUT gets h200.json, plots and, in OUT/parts, each part's own JSON and log. `--help` lists the rest.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
exec "$PYTHON" -u -m benchmarks.h200 "$@"
