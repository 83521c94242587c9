#!/usr/bin/env bash
# Collect what a GPU machine without a network lacks, as wheels in .wheels (git-ignored), for
# benchmarks/gpu/run.sh to install:
#
#     benchmarks/gpu/wheels.sh                    diffusers, and what it and we need beside it
#     benchmarks/gpu/wheels.sh NAME==VERSION ...  more beside these, such as flash-attn-4's parts
#
# The machine has the packages of benchmarks/gpu/machine.txt. Wheels are for Python 3.12 on x86-64.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-.wheels}
LIMIT=45 # MiB: the working tree travels with them, and both may take 64
platforms=()
for each in manylinux_2_{28,27,24,17,5}_x86_64 manylinux{2014,2010,1}_x86_64; do
  platforms+=(--platform "$each")
done
names=()
for name in diffusers beautifulsoup4 soupsieve ftfy wcwidth; do
  names+=("$(grep -i "^$name==" constraints.txt)")
done
rm -rf "$WHEELS"
"$PYTHON" -m pip --disable-pip-version-check download -q --no-deps --only-binary=:all: \
  --python-version 3.12 --implementation cp "${platforms[@]}" -d "$WHEELS" "${names[@]}" "$@"
size=$(du -sm "$WHEELS" | cut -f1)
ls -s --block-size=KiB "$WHEELS"
if [ "$size" -gt "$LIMIT" ]; then
  echo "error: the wheels take $size MiB, more than the $LIMIT that may travel; ask for fewer" >&2
  exit 1
fi
