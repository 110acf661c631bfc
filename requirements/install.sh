#!/bin/sh
# Installs locks and Potstill itself into .venv, which it makes if need be:
#     sh requirements/install.sh cpu dev
# Locks are complete lists, so nothing is resolved here (--no-deps). PYTHON chooses the interpreter.
set -eu
cd "$(dirname "$0")/.."
torch_index=https://download.pytorch.org/whl/cpu
log=.venv/install.log

find_python() {
    for candidate in ${PYTHON:-python3.11 python3}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Potstill needs Python 3.11, and ${PYTHON:-python3.11 or python3} is not it:" \
        "install Python 3.11, or run: make PYTHON=/path/to/python3.11" >&2
    return 1
}

# Says every 15 s that work goes on. It is what runs in the background, so that Ctrl-C reaches pip.
tick() {
    while sleep 15 >/dev/null 2>&1; do
        echo "  $1 ... $(($(date +%s) - begin)) s"
    done
}

# Runs a command with its output in the log.
quietly() {
    what=$1
    shift
    begin=$(date +%s)
    tick "$what" &
    ticker=$!
    trap 'kill "$ticker" 2>/dev/null' EXIT
    trap 'exit 130' INT TERM
    "$@" >>"$log" 2>&1 </dev/null || return 1
    kill "$ticker"
    trap - EXIT INT TERM
    echo "  $what: done in $(($(date +%s) - begin)) s"
}

pip_install() {
    .venv/bin/python -m pip install --no-input --disable-pip-version-check --no-deps "$@"
}

# PyTorch's CPU builds are on PyTorch's own index; a machine may have them nearer.
torch_install() {
    pip_install "$1" || pip_install --index-url "$torch_index" "$1"
}

# The last lines of the log, and then what to do.
fail() {
    tail -n 20 "$log" >&2
    echo "$1 could not be installed: see above, and $log. ${2:-}" >&2
    exit 1
}

if [ ! -x .venv/bin/python ]; then
    python=$(find_python)
    echo "Making .venv and installing into it: 3 to 10 minutes, and 4 GB (CPU) or 12 GB (CUDA) of disk"
    "$python" -m venv .venv
fi
for name in "$@"; do
    lock=requirements/$name.txt
    torch=$(grep '^torch==.*+cpu$' "$lock" || true)
    if [ -n "$torch" ]; then
        quietly "$torch" torch_install "$torch" || fail "$torch" "PyTorch's CPU build comes from \
$torch_index, or from where PIP_FIND_LINKS tells pip to look: one of the two must be in reach."
    fi
    quietly "$lock" pip_install -r "$lock" || fail "$lock"
done
quietly potstill pip_install --no-build-isolation -e . || fail potstill
for name in "$@"; do
    touch ".venv/$name.installed"
done
