#!/usr/bin/env bash
# All that `make demo` and `make test` need: the system packages, and a virtual environment in .venv that holds the
# pinned packages of requirements.txt and this package, editable. Does nothing, at once, where that is done.
#
#   scripts/setup.sh                                   # any Python 3.11-3.13
#   PYTHON=3.12 scripts/setup.sh                       # this one; also a command or a path
set -euo pipefail
cd "$(dirname "$0")/.."

stamp=.venv/ffssl-setup  # written last: what .venv was made from, and where, for a moved .venv does not work
contents() { pwd; cat requirements.txt pyproject.toml setup.py scripts/setup.sh scripts/common.sh; }
done_already() {
    [[ -f $stamp && -x .venv/bin/python && $(contents | cksum) == "$(<$stamp)" ]] || return 1
    [[ -z ${PYTHON:-} || $(version_of "$PYTHON") == "$(version_of .venv/bin/python)" ]]
}
version_of() {  # 3.12 of a command, or of a version
    if [[ $1 =~ ^3\.[0-9]+ ]]; then echo "${BASH_REMATCH[0]}"; else "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; fi
}
if done_already; then exit 0; fi

source scripts/common.sh
exec 9>.cache/lock
if command -v flock >/dev/null && ! flock -n 9; then
    say "waiting for another set-up of this folder"
    flock 9
    if done_already; then exit 0; fi
fi

find_python
install_system_packages
get_uv

# An environment that a set-up left half-made is made anew. Any other is kept, with what its owner added to it.
unfinished=.cache/unfinished
if [[ -f $unfinished ]] || ! .venv/bin/python -c '' 2>/dev/null; then
    fresh=1
elif [[ -n ${PYTHON:-} && $(version_of "$python") != "$(version_of .venv/bin/python)" ]]; then
    [[ -f $stamp ]] || fail ".venv is not of $PYTHON, and not made by this script: remove it, or leave PYTHON out"
    fresh=1
else
    supported .venv/bin/python || fail ".venv is not of Python 3.11, 3.12 or 3.13: remove it, then try again"
    fresh=0
fi
touch $unfinished
rm -f $stamp
if [[ $fresh -eq 1 ]]; then
    say "making .venv with $("$python" --version)"
    rm -rf .venv
    "$uv" venv --quiet --seed --python "$python" .venv
fi
say "installing the packages of requirements.txt (6 GB with CUDA's libraries; minutes, the first time)"
"$uv" pip install --quiet --python .venv/bin/python --build-constraints requirements.txt -r requirements.txt
"$uv" pip install --quiet --python .venv/bin/python --build-constraints requirements.txt --no-deps --editable .
.venv/bin/python -c 'import torchvision, ffcv, ffssl' ||
    fail "the packages are installed but do not load (above). If ffcv is at fault, it was built against other system" \
         "libraries: run '$uv cache clean ffcv', then try again"
contents | cksum > $stamp
rm $unfinished
say "done"
