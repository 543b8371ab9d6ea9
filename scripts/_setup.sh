# Sourced by the other scripts: `setup_environment` makes or finds the Python environment and sets PYTHON.
#   KEEPLORA_PYTHON=/path/to/python   use this interpreter as it is, install nothing

setup_environment() {
    cd "$(dirname "${BASH_SOURCE[0]}")/.." || return 1
    # Two threads that spin while they wait for a busy core are slower than one; passive waiting costs nothing on free ones.
    export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
    if [ -n "${KEEPLORA_PYTHON:-}" ]; then
        PYTHON=$KEEPLORA_PYTHON
        return
    fi
    PYTHON=$PWD/.venv/bin/python
    local stamp=.venv/installed wanted
    wanted=$(cat pyproject.toml constraints.txt scripts/_setup.sh | cksum)
    if [ -x "$PYTHON" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    _check_python || return 1
    echo "setting up .venv (once; some minutes)" >&2
    python3 -m venv .venv &&
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' &&
        _prepare_startup &&
        echo "$wanted" >"$stamp" ||
        { echo "error: the installation failed; run the same command again to continue it" >&2; return 1; }
}

# Beside a CPU-only torch, PyPI's torchvision does not import by itself, and with it `accelerate launch`.
_prepare_startup() {
    "$PYTHON" - "$PWD/mllm_keeplora/modeling/compat.py" <<'END'
import pathlib, sys, sysconfig

lines = (
    "import importlib.util as u",
    f"s = u.spec_from_file_location('keeplora_startup', {sys.argv[1]!r})",
    "m = u.module_from_spec(s)",
    "s.loader.exec_module(m)",
    "m.install()",
)
pathlib.Path(sysconfig.get_path("purelib"), "keeplora_startup.pth").write_text("; ".join(lines) + "\n")
END
}

_check_python() {
    python3 -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && return
    echo "error: python3 must be Python >= 3.11 with the venv module, found: $(python3 --version 2>&1)." >&2
    echo "Install one, or set KEEPLORA_PYTHON to an interpreter that has this project installed." >&2
    return 1
}
