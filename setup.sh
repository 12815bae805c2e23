# Sourced by run_train.sh and tests/run.sh: leaves an environment with torchladder on the PATH.
#
#   source setup.sh REQUIREMENTS
#
# Uses the current Python if it already has torchladder and all that REQUIREMENTS names; otherwise makes .venv beside
# this file and installs the tested versions. On a machine without an NVIDIA GPU it takes the CPU build of torch where
# an index offers one. PYTHON chooses the interpreter, TORCH_CPU_INDEX the index to ask for the CPU build.

setup() {
    local root requirements python stamp torch
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
    requirements="$root/$1"
    python="${PYTHON:-python3}"

    if (cd / && has_all "$python" "$requirements"); then
        PYTHON="$python"
        return
    fi
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "torchladder needs Python 3.10 or newer; '$python' is $("$python" --version 2>&1). Set PYTHON to another." >&2
        exit 1
    fi

    # The stamp holds what was installed, so that changed requirements are installed again and nothing else is.
    stamp="$root/.venv/installed-$1"
    if ! cmp -s <(cat "$root/pyproject.toml" "$root"/requirements*.txt) "$stamp"; then
        echo "torchladder: setting up $root/.venv (once, about a minute)"
        [ -x "$root/.venv/bin/python" ] || "$python" -m venv "$root/.venv" || {
            echo "torchladder: '$python -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2
            exit 1
        }
        python="$root/.venv/bin/python"
        torch="$(grep '^torch==' "$root/requirements.txt")"
        install_torch "$python" "$torch"
        "$python" -m pip install --quiet --no-compile --disable-pip-version-check -r "$requirements"
        "$python" -m pip install --quiet --no-compile --disable-pip-version-check --no-deps --editable "$root"
        cat "$root/pyproject.toml" "$root"/requirements*.txt > "$stamp"
    fi
    PYTHON="$root/.venv/bin/python"
}

# Whether this Python can import torchladder and has every package that the requirements name for it.
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
