#!/usr/bin/env bash
# lock.sh VENV: writes constraints.txt from the newest versions that fit pyproject.toml.
set -euo pipefail
python=$1/bin/python

mapfile -t requirements < <("$python" scripts/extras.py serve engine | tr ' ' '\n')
"$python" -m pip install --quiet --upgrade --upgrade-strategy eager "${requirements[@]}" --group development
{
    echo "# Written by \`make lock\`: the versions that check and test run with."
    "$python" -m pip freeze --exclude-editable --exclude llama-gpu
} >constraints.txt
