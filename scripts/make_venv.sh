#!/usr/bin/env bash
# make_venv.sh DIR: a virtual environment with a pip that knows dependency groups.
set -euo pipefail
directory=$1

python=
for candidate in "${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11 if it is not on PATH." >&2
    exit 1
fi

# Debian and Ubuntu keep ensurepip in a package of its own.
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get install -y -q "$package" || { apt-get update -q && apt-get install -y -q "$package"; }
    else
        echo "This Python cannot make virtual environments. On Debian or Ubuntu: sudo apt-get install $package" >&2
        exit 1
    fi
fi

"$python" -m venv "$directory"
"$directory/bin/python" -m pip install --quiet --upgrade 'pip>=25.1'
