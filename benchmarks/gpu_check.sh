#!/usr/bin/env bash
# Everything that only a GPU can show, on one card in under eight minutes: prints a table, writes docs/benchmarks/gpu.md.
# From a plain checkout: needs PYTHON (default python3) with torch; WHEELS=FOLDER installs what else is missing from there.
#   benchmarks/gpu_check.sh
#   benchmarks/gpu_check.sh --dry --out FILE    # on the CPU, tiny
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "${WHEELS:-}" ]; then
    [ -d "$WHEELS" ] || { echo "WHEELS=$WHEELS is no folder" >&2; exit 2; }
    "$PYTHON" -m pip install --quiet --no-index --no-deps --find-links "$WHEELS" "$WHEELS"/*.whl
fi
"$PYTHON" -c 'import torch' 2>/dev/null || { echo "$PYTHON has no torch; set PYTHON to one that has" >&2; exit 2; }
exec "$PYTHON" benchmarks/gpu_check.py "$@"
