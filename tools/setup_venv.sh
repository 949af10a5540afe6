#!/usr/bin/env bash
# Makes <repository>/.venv with the pinned packages of requirements/*.lock and this package, editable.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: tools/setup_venv.sh [--dev]

Makes .venv in the repository with Python 3.11 and everything pinned in requirements/cpu.lock, then this
package itself (editable). Does nothing when .venv is current; finishes an install that was interrupted.

  --dev    also install requirements/dev.lock (pytest, ruff)

pip's own configuration and PIP_* variables are in force. The CPU build of torch comes from PyTorch's own
package index: name it in PIP_EXTRA_INDEX_URL, or pip installs the CUDA build, which works too but is larger.
PYTHON names the interpreter to use instead of python3.11 or python3.
USAGE
}

say() { printf 'setup_venv: %s\n' "$*"; }
die() {
    printf 'setup_venv: %s\n' "$*" >&2
    exit 1
}

extras=base
for argument in "$@"; do
    case "$argument" in
        --dev) extras=dev ;;
        -h | --help)
            usage
            exit 0
            ;;
        *)
            usage >&2
            exit 2
            ;;
    esac
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
cd "$root"

# What an install is made of; pip's sources stay out, so that another mirror does not make .venv stale.
inputs=(requirements/cpu.lock setup.py pyproject.toml)
locks=(-r requirements/cpu.lock)
if [ "$extras" = dev ]; then
    inputs+=(requirements/dev.lock)
    locks+=(-r requirements/dev.lock)
fi
want=$(sha256sum "${inputs[@]}" | sha256sum | cut -c1-64)
stamp=$venv/.stamp.$extras

# Current: installed from these very inputs, in this place (a venv cannot be moved), with a Python that runs.
is_ours() {
    grep -qF -e "=$venv" -e "\"$venv" -e "'$venv" "$venv/bin/activate" 2>/dev/null &&
        "$venv/bin/python" -c '' 2>/dev/null
}
is_current() { [ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && is_ours; }

is_current && exit 0

# The lock lies in .venv, whose entries but not itself are removed below. It is held by pip too: when this
# script is killed, the next call waits until the orphaned pip is done.
mkdir -p "$venv"
exec 9>"$venv/.lock"
if ! flock --nonblock 9; then
    say "another setup_venv.sh is at work on $venv: waiting for it"
    flock 9
fi
is_current && exit 0
started=$SECONDS

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    die "needs Python 3.11 (python3.11 or python3 on PATH, or PYTHON=/path/to/python3.11): found none"
}

# The names of packages that a killed pip has left half-written. pip writes a package's RECORD last and lists
# its own INSTALLER file there, so a complete package has that entry and every file of the list.
half_written() {
    "$venv/bin/python" - <<'PYTHON'
import importlib.metadata
import shutil
import sysconfig

for dist in importlib.metadata.distributions(path=[sysconfig.get_path("purelib")]):
    files = dist.files or []
    complete = any(file.name == "INSTALLER" for file in files)
    if not complete or not all(file.locate().exists() for file in files if file.suffix != ".pyc"):
        print(dist.metadata["Name"] or dist._path.name)
        shutil.rmtree(dist._path, ignore_errors=True)  # pip then takes it for absent and writes it anew
PYTHON
}

is_broken() { ! is_ours || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; }

make_venv() {
    local python
    python=$(find_python)
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$python has no ensurepip: install it (on Debian and Ubuntu: apt-get install python3.11-venv)"
    say "making $venv with $("$python" --version)"
    find "$venv" -mindepth 1 -maxdepth 1 ! -name .lock -exec rm -rf {} +
    "$python" -m venv "$venv" || die "python -m venv failed"
}

# pip's own words go to install.log; here a line for every 25 packages, and what went wrong.
show_progress() {
    local line packages=0
    while IFS= read -r line; do
        case "$line" in
            Collecting* | "Requirement already satisfied"*)
                packages=$((packages + 1))
                [ $((packages % 25)) -ne 0 ] || say "$packages packages found or fetched"
                ;;
            "Installing collected packages"*) say "unpacking" ;;
            *"pip's dependency resolver"*) ;; # about what the lock leaves out on purpose
            *ERROR:* | "WARNING: Retrying"*) say "$line" >&2 ;;
        esac
    done
}

pip_install() {
    "$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off "$@" 2>&1 |
        tee -a "$venv/install.log" | show_progress ||
        die "pip failed (its output: $venv/install.log); call again to go on from here"
}

rm -f "$venv"/.stamp.* "$venv/install.log"
if is_broken; then
    make_venv
else
    repaired=$(half_written)
    if [ -n "$repaired" ]; then
        say "left half-written by an interrupted install, done again: ${repaired//$'\n'/ }"
        # pip itself can be among them
        if is_broken; then make_venv; fi
    fi
fi

"$venv/bin/python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null ||
    die "vLLM needs the system library libnuma.so.1 (on Debian and Ubuntu: apt-get install libnuma1)"

count=$(grep -cE '^[A-Za-z0-9]' requirements/cpu.lock)
say "installing the $count packages of requirements/cpu.lock (some minutes, the first time)"
pip_install --no-deps "${locks[@]}"

# A torch from PyPI is the CUDA build, and --no-deps has left out the CUDA libraries that it loads at import.
if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    torch=$(grep '^torch==' requirements/cpu.lock)
    "$venv/bin/python" -c 'import importlib.metadata as m, sys
sys.exit(not any("cuda" in r or "nvidia" in r for r in m.requires("torch")))' ||
        die "torch is installed but does not import: try $venv/bin/python -c 'import torch'"
    say "this torch is the CUDA build (no index of pip's has the CPU build): adding its libraries"
    grep -vE '^(torch|triton)==' requirements/cpu.lock >"$venv/constraints.txt"
    pip_install "$torch" --constraint "$venv/constraints.txt"
    "$venv/bin/python" -c 'import torch' || die "torch does not import"
fi

say "installing siren-megatron (editable)"
pip_install --no-deps --no-build-isolation --editable .

printf '%s\n' "$want" >"$stamp.new"
mv "$stamp.new" "$stamp"
if [ "$extras" = dev ]; then # what --dev installs holds what a plain call installs
    sha256sum "${inputs[@]:0:3}" | sha256sum | cut -c1-64 >"$venv/.stamp.base.new"
    mv "$venv/.stamp.base.new" "$venv/.stamp.base"
fi
say "$venv is ready ($((SECONDS - started)) s)"
