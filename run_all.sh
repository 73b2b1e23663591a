#!/usr/bin/env bash
# Runs the study, its tests, or a look at its state: `./run_all.sh --help` lists the commands.
#
# An active environment that meets the ranges of pyproject.toml is used as it is; otherwise the
# versions of requirements.lock are installed into .venv beside this file, once.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"

python=""
for candidate in python3 python python3.13 python3.12 python3.11 "$here/.venv/bin/python"; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python="$candidate"
        break
    fi
done
if [ -z "$python" ]; then
    echo "run_all: no Python 3.11 or newer found; install one, or activate an environment" \
        "that has one" >&2
    exit 2
fi

extra=()
if [ "${1:-}" = test ]; then extra=(--tests); fi
# -P keeps the folder that the user stands in from shadowing this project's modules.
python="$("$python" -P -m allo_lib.machine.environment ${extra[@]+"${extra[@]}"})"
exec "$python" -P -m allo_lib.cli.cli "$@"
