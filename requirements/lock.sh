#!/bin/sh
# Resolves pyproject.toml into the locks. Versions stay where they can, unless --upgrade is given.
# gemma.txt and dev.txt hold only what they add to cpu.txt.
set -eu
cd "$(dirname "$0")"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
upgrade=${1:-}

compile() {
    ../.venv/bin/uv pip compile ../pyproject.toml --quiet --no-header --no-annotate $upgrade \
        --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
        --override overrides.txt --extra smollm "$@"
}

# uv does not read pip's settings: where those name a folder of wheels, PyTorch's CPU build is in it.
compile_cpu() {
    if [ -n "${PIP_FIND_LINKS:-}" ]; then
        compile --override overrides-cpu.txt --find-links "$PIP_FIND_LINKS" --extra cpu "$@"
    else
        compile --override overrides-cpu.txt --torch-backend cpu --extra cpu "$@"
    fi
}

compile_cpu --output-file cpu.txt
for extra in gemma dev; do
    cat cpu.txt "$extra.txt" >"$scratch/$extra.txt"
    compile_cpu --extra "$extra" --constraint cpu.txt --output-file "$scratch/$extra.txt"
    grep -vxF -f cpu.txt "$scratch/$extra.txt" >"$extra.txt"
done
compile --extra gpu --output-file gpu.txt
