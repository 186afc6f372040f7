#!/bin/sh
# Prints the first Python that can run lora-jax (3.11 or newer, able to make virtual environments), or says what is wrong.
# $PYTHON, where set, is the only one tried.
set -u

candidates="${PYTHON:-python3 python3.13 python3.12 python3.11 python}"
seen=""
for candidate in $candidates; do
    version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
    if ! "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        seen="$seen $candidate is $version;"
        continue
    fi
    if ! "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
        seen="$seen $candidate $version cannot make a virtual environment (on Debian or Ubuntu: apt install python3-venv);"
        continue
    fi
    command -v "$candidate"
    exit 0
done

echo "error: lora-jax needs Python 3.11 or newer. Tried: $candidates." >&2
echo "       Found:${seen:- none of them.}" >&2
echo "       Install one, or name it: make PYTHON=/path/to/python3.11" >&2
exit 2
