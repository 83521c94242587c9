#!/usr/bin/env bash
# Both calls of run.sh with tiny shapes, as a GPU machine would run them: from a copy of the tracked
# files without .git, with the wheels beside it, on PYTHON, which has machine.txt and no more. The
# results, and each call's log, are left in runs/gpu-rehearsal. `make gpu-rehearsal` starts this.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHON=${PYTHON:?the interpreter of the environment that has benchmarks/gpu/machine.txt}
case $PYTHON in */*) PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON") ;; esac
compgen -G ".wheels/*.whl" >/dev/null || benchmarks/gpu/wheels.sh
kept=$PWD/runs/gpu-rehearsal
rm -rf "$kept" && mkdir -p "$kept"
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -z | tar --create --null --files-from=- | tar --extract --directory "$copy"
cp -r .wheels "$copy"
commit=$(git rev-parse HEAD)$(git diff --quiet HEAD || echo +)
export OUT=$copy/out
unset PYTHONPATH
export OMP_NUM_THREADS=1 # two jobs side by side, perhaps on two cores: more threads only wait
alone=() # without a network, where this machine lets us take it away
if unshare -rn ip link set lo up 2>/dev/null; then
  alone=(unshare -rn sh -c 'ip link set lo up; exec "$@"' sh)
else
  echo "the network cannot be taken away here; that nothing asks it is not tried" >&2
fi
failed=0
for call in check measure; do
  "${alone[@]}" "$copy/benchmarks/gpu/run.sh" $call --small --commit "$commit" 2>&1 | tee "$kept/$call.log" ||
    failed=1
done
cp "$OUT"/* "$kept"
count=$(find "$OUT" -type f | wc -l)
large=$(find "$OUT" -type f -size +16M)
if [ "$count" -gt 8 ] || [ -n "$large" ]; then
  echo "error: $count files leave, of which too large: ${large:-none}; 8 of 16 MiB may" >&2
  failed=1
fi
[ $failed = 0 ] && echo "both calls ended well; their results are in $kept"
exit $failed
