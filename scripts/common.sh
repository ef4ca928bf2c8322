# shellcheck shell=bash
# What setup.sh and wheelhouse.sh share: find a Python, the system packages and uv. Sourced, from the repository root.

UV_VERSION=0.13.9  # installed privately, in .cache/uv, where there is no uv on the PATH

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { printf 'setup: error: %s\n' "$@" >&2; exit 1; }

# A private folder for tools and locks, which git ignores without being told.
mkdir -p .cache && echo '*' > .cache/.gitignore

supported() {  # supported COMMAND [3.12]: runs, is CPython 3.11-3.13, and is that version if one is asked for
    "$1" - "${2:-}" 2>/dev/null <<'END'
import sys
version = "%d.%d" % sys.version_info[:2]
full = "%d.%d.%d" % sys.version_info[:3]
good = sys.implementation.name == "cpython" and (3, 11) <= sys.version_info[:2] <= (3, 13)
sys.exit(not (good and sys.argv[1] in ("", version, full)))
END
}

find_python() {  # sets $python to a Python 3.11-3.13; $PYTHON may name one: a command, a path or a version
    local wanted="" candidate
    local -a candidates=(python3 python3.13 python3.12 python3.11)
    if [[ ${PYTHON:-} =~ ^(3\.[0-9]+)(\.[0-9]+)?$ ]]; then
        wanted=$PYTHON
        [[ ${BASH_REMATCH[1]} =~ ^3\.1[123]$ ]] || fail "PYTHON=$PYTHON: only Python 3.11, 3.12 and 3.13 will do"
        candidates=("python${wanted:0:4}" python3)
    elif [[ -n ${PYTHON:-} ]]; then
        command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON: no such command"
        supported "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.11, 3.12 or 3.13"
        candidates=("$PYTHON")
    fi
    for candidate in "${candidates[@]}" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[321]*/bin/python3 uv; do
        if [[ $candidate == uv ]]; then candidate=$(python_of_uv "$wanted") || true; fi
        if command -v "$candidate" >/dev/null && supported "$candidate" "$wanted"; then
            # Not the Python of an activated environment, which may be the .venv that is to be made anew.
            python=$("$candidate" -c 'import sys; print(sys._base_executable)')
            return
        fi
    done
    fail "no Python ${wanted:-3.11, 3.12 or 3.13} found. Install one (Debian 12, Ubuntu 24.04: apt-get install python3)," \
         "or name one: make test PYTHON=/path/to/python3.12"
}

python_of_uv() {  # prints a Python that uv knows of, or installs one of its own; nothing if it cannot
    python=python3
    if ! get_uv >/dev/null 2>&1; then return; fi
    "$uv" python find "${1:->=3.11,<3.14}" 2>/dev/null && return
    say "no Python ${1:-3.11-3.13} found: asking uv to install one"
    if "$uv" python install --quiet "${1:-3.12}"; then "$uv" python find "${1:-3.12}"; fi
}

find_uv() {  # sets $uv to a uv that runs
    for uv in uv "$HOME/.local/bin/uv" "$PWD/.cache/uv/bin/uv"; do
        if "$uv" --version >/dev/null 2>&1; then return 0; fi
    done
    return 1
}

get_uv() {  # find_uv, or install uv for ourselves alone
    if find_uv; then return; fi
    say "installing uv $UV_VERSION in .cache/uv"
    rm -rf .cache/uv
    { "$python" -m venv .cache/uv &&
        .cache/uv/bin/python -m pip install --quiet --disable-pip-version-check "uv==$UV_VERSION" && find_uv; } ||
        fail "uv could not be installed (above). Install it yourself, so that 'uv' is on the PATH, then try again"
}

missing_packages() {  # prints the Debian packages that building and running ffcv, and making .venv, still need
    command -v g++ >/dev/null || echo g++
    command -v pkg-config >/dev/null || echo pkg-config
    pkg-config --exists opencv4 2>/dev/null || echo libopencv-dev
    pkg-config --exists libturbojpeg 2>/dev/null || echo libturbojpeg0-dev
    local version
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
        echo "python$version-dev"
    find_uv || "$python" -c 'import ensurepip' 2>/dev/null || echo "python$version-venv"
}

install_system_packages() {
    local -a packages root=()
    mapfile -t packages < <(missing_packages)
    if [[ ${#packages[@]} -eq 0 ]]; then return; fi
    local command="apt-get update && apt-get install -y --no-install-recommends ${packages[*]}"
    if ! command -v apt-get >/dev/null; then
        fail "system packages are missing, and this is not Debian or Ubuntu. Install your distribution's equivalents of:" \
             "    ${packages[*]}"
    fi
    if [[ $(id -u) -ne 0 ]]; then
        root=(sudo -n)
        if ! sudo -n true 2>/dev/null; then
            fail "system packages are missing, and installing them needs root. Run this, then try again:" \
                 "    sudo sh -c '$command'"
        fi
    fi
    say "installing system packages: ${packages[*]}"
    # 9>&-: a service started by a package must not keep our lock.
    if ! { "${root[@]}" apt-get update -qq &&
           "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
               -o DPkg::Lock::Timeout=300 "${packages[@]}"; } </dev/null >.cache/apt.log 2>&1 9>&-; then
        tail -n 20 .cache/apt.log >&2
        fail "installing system packages failed (above, and .cache/apt.log). Try it by hand:" "    sudo sh -c '$command'"
    fi
    mapfile -t packages < <(missing_packages)
    if [[ ${#packages[@]} -ne 0 ]]; then
        fail "apt-get installed the system packages, but these still cannot be found: ${packages[*]}"
    fi
}
