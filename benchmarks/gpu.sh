#!/bin/sh
# Annotating and training on a GPU at real sizes, in under ten minutes: one dated Markdown table under docs/.
#
#   benchmarks/gpu.sh [OUT.md]
#
# PYTHON names the interpreter (python3); it needs torch with CUDA and the package's dependencies. A benchmark that takes
# longer than its share is cut off, and the file says so.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${1:-docs/gpu-$(date +%Y-%m-%d).md}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: $PYTHON sees no CUDA device; run this where there is one, or name another interpreter in PYTHON" >&2
    exit 1
fi

table() { # title, seconds, command…
    title=$1 limit=$2
    shift 2
    printf '\n## %s\n\n`%s`\n\n' "$title" "$*" | sed "s#$PYTHON#python#"
    timeout "$limit" "$@" || echo "(not finished: exit status $?, limit $limit s)"
}

report() {
    echo "# On a GPU, $(date +%Y-%m-%d)"
    echo
    "$PYTHON" -c 'import os, torch, torchvision; print(f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores, torch {torch.__version__}, torchvision {torchvision.__version__}.")'
    echo "Each script says how to read its columns."
    table "Tests that need a GPU" 90 "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_gpu.py
    table "Training: garments of 28 pixels" 110 "$PYTHON" benchmarks/train.py --device cuda --quick
    table "Training: ResNet-18 at 224 pixels, ViT-B/16 as the teacher" 150 "$PYTHON" benchmarks/train.py --device cuda --photographs
    table "Annotating" 220 "$PYTHON" benchmarks/annotate.py --device cuda --quick
}

mkdir -p "$(dirname "$OUT")"
report >"$OUT.part" && mv "$OUT.part" "$OUT" && echo "$OUT"
