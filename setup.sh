# Sourced by run_train.sh and tests/run.sh: sets PYTHON to an interpreter that has torchladder installed.
#
#   source setup.sh REQUIREMENTS
#
# Uses the current Python if it has torchladder and every package of REQUIREMENTS; otherwise creates .venv beside this
# file and installs the tested versions there. Without an NVIDIA GPU it installs the CPU build of torch if an index has
# one. Set PYTHON to use another interpreter, TORCH_CPU_INDEX to get the CPU build from another index.

setup() {
    local root requirements python stamp torch
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
    requirements="$root/$1"
    python="${PYTHON:-python3}"

    if (cd / && has_all "$python" "$requirements"); then
        PYTHON="$python"
        return
    fi
    if ! command -v "$python" > /dev/null; then
        echo "torchladder: there is no program '$python'. Set PYTHON to Python 3.10 or newer." >&2
        exit 2
    fi
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "torchladder needs Python 3.10 or newer; '$python' is $("$python" --version 2>&1). Set PYTHON to a newer one." >&2
        exit 2
    fi

    # The stamp records the installed requirements: packages are installed again only when they change.
    stamp="$root/.venv/installed-$1"
    if ! cmp -s <(cat "$root/pyproject.toml" "$root"/requirements*.txt) "$stamp"; then
        echo "torchladder: setting up $root/.venv (once, about a minute)"
        [ -e "$root/.venv" ] || "$python" -m venv "$root/.venv" || {
            rm -rf "$root/.venv"
            echo "torchladder: '$python -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2
            exit 2
        }
        python="$root/.venv/bin/python"
        if ! is_venv_with_pip "$python" "$root/.venv"; then
            echo "torchladder: $root/.venv is not a virtual environment with pip. Remove it and run this again." >&2
            exit 2
        fi
        torch="$(grep '^torch==' "$root/requirements.txt")"
        install_torch "$python" "$torch"
        "$python" -m pip install --quiet --no-compile --disable-pip-version-check -r "$requirements"
        "$python" -m pip install --quiet --no-compile --disable-pip-version-check --no-deps --editable "$root"
        cat "$root/pyproject.toml" "$root"/requirements*.txt > "$stamp"
    fi
    PYTHON="$root/.venv/bin/python"
}

# is_venv_with_pip PYTHON FOLDER: whether PYTHON installs into FOLDER; a link to another Python would install there.
is_venv_with_pip() {
    "$1" - "$2" 2>/dev/null <<'VENV'
import os, sys
import pip
sys.exit(sys.prefix == sys.base_prefix or not os.path.samefile(sys.prefix, sys.argv[1]))
VENV
}

# has_all PYTHON REQUIREMENTS: whether PYTHON has torchladder and every package that the requirements list for it.
has_all() {
    "$1" - "$2" 2>/dev/null <<'PY'
import importlib.metadata, importlib.util, pathlib, sys
try:
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging.requirements import Requirement
if importlib.util.find_spec("torchladder") is None:
    sys.exit(1)
pending = [pathlib.Path(sys.argv[1])]
while pending:
    file = pending.pop()
    for line in file.read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r "):
            pending.append(file.parent / line[3:].strip())
        elif line:
            named = Requirement(line)
            if named.marker is None or named.marker.evaluate():  # python_version < "3.11", for one
                importlib.metadata.version(named.name)
PY
}

install_torch() {
    local python="$1" torch="$2"
    local pip=("$python" -m pip install --quiet --no-compile --disable-pip-version-check)
    if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi > /dev/null; then
        "${pip[@]}" "$torch+cpu" 2>/dev/null && return
        "${pip[@]}" --retries 1 --extra-index-url "${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}" \
            "$torch+cpu" 2>/dev/null && return
    fi
    "${pip[@]}" "$torch"
}

setup "$1"
