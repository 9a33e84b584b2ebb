# Sourced by every finding: a temporary folder, removed at the end, and virtual environments in it with nothing but what is named.

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export TRITON_CACHE_DIR="$folder/triton-cache" TORCHINDUCTOR_CACHE_DIR="$folder/inductor-cache"
unset TRITON_INTERPRET PYTHONPATH

# fresh NAME ARGUMENT...: the environment "$folder/NAME", with what `pip install ARGUMENT...` puts there. Again for the same NAME: more of it.
# PYTHON is the interpreter (3.10 to 3.13), PIP_FLAGS are further flags of pip, such as the index of PyTorch's CPU builds.
fresh() {
    local environment="$folder/$1"
    shift
    [ -d "$environment" ] || "${PYTHON:-python3}" -m venv "$environment"
    # shellcheck disable=SC2086 -- several flags
    "$environment/bin/python" -m pip install -q --disable-pip-version-check ${PIP_FLAGS:-} "$@" >&2
}
