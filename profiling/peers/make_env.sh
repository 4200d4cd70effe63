#!/usr/bin/env bash
# Builds the environment of one peer trainer from the package index.
#
#   profiling/peers/make_env.sh trl|tunix FOLDER
#
# Each peer gets an environment of its own: their requirements contradict each other and ours. PYTHON chooses the interpreter
# (default python3, >= 3.11). The versions below are those the numbers in profiling/results/ were taken with; `PINNED=0` takes
# the newest of everything except torch (an unpinned torch can pull gigabytes of CUDA libraries).
set -euo pipefail

if [[ $# -ne 2 ]]; then
    echo "usage: $0 trl|tunix FOLDER" >&2
    exit 2
fi
name=$1
folder=$2
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
requirements="$here/requirements-$name.txt"
if [[ ! -f $requirements ]]; then
    echo "$0: unknown peer '$name': expected one of trl, tunix" >&2
    exit 2
fi

"${PYTHON:-python3}" -m venv "$folder"
if [[ ${PINNED:-1} == 0 ]]; then
    loose=$(mktemp)
    trap 'rm -f "$loose"' EXIT
    sed -E '/^torch==/!s/==.*$//' "$requirements" >"$loose"
    requirements=$loose
fi
"$folder/bin/python" -m pip install --quiet --requirement "$requirements"
"$folder/bin/python" -m pip check || echo "$0: pip reports the inconsistencies above; see profiling/peers/README.md" >&2
echo "$name: $folder/bin/python"
