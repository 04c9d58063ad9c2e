# Sourced by launchers/demo.sh and tests/run.sh: makes .venv in the root of the repository and installs into it.
#
#   make_venv EXTRA    EXTRA is an optional-dependency group of pyproject.toml
#
# Does nothing if .venv already has what pyproject.toml and constraints.txt require. FITV2_PYTHON names the
# interpreter; otherwise it is the newest of python3.12, python3.11 and python3 that is suitable.

say() { printf '\n==> %s\n' "$*"; }
die() { printf '%s\n' "$*" >&2; exit 2; }

find_python() {
  local candidate
  for candidate in ${FITV2_PYTHON:-python3.12 python3.11 python3}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  die "Python 3.11 or 3.12 is required: install it, or set FITV2_PYTHON to it."
}

# Debian packages venv apart from Python. As root this installs it; otherwise it prints the command.
make_empty_venv() {
  local python=$1
  if ! "$python" -c 'import ensurepip' 2>/dev/null; then
    local package
    package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || die "Install $package first: apt-get install $package"
    say "Installing $package"
    apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "$package"
  fi
  "$python" -m venv .venv
}

# torch alone and first: its default build brings several GB of CUDA packages, which are useless without a GPU.
install_torch() {
  local wanted=$1 plan
  if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    .venv/bin/python -m pip install -q "$wanted"
    return
  fi
  plan=$(.venv/bin/python -m pip install -q --dry-run --report - "$wanted") || die "pip cannot find $wanted."
  if ! grep -qE '"name": "(nvidia|cuda|triton)' <<<"$plan"; then
    .venv/bin/python -m pip install -q "$wanted"
  else # uv knows where PyTorch keeps its CPU builds
    .venv/bin/python -m pip install -q uv && .venv/bin/uv pip install -q --python .venv/bin/python \
      --torch-backend cpu "$wanted" || die "No CPU build of $wanted can be downloaded, and this machine has no GPU."
  fi
}

make_venv() {
  local extra=$1 python stamp
  stamp=$(cat pyproject.toml launchers/constraints.txt | sha256sum | cut -c1-16)
  if [ -f ".venv/ready-$extra-$stamp" ]; then
    return
  fi
  if [ ! -x .venv/bin/python ]; then
    python=$(find_python)
    say "Making .venv with $("$python" --version)"
    make_empty_venv "$python"
  fi
  export PIP_DISABLE_PIP_VERSION_CHECK=1
  say "Installing torch"
  install_torch "$(grep '^torch==' launchers/constraints.txt)"
  say "Installing fitv2_scale and what it needs ($extra)"
  .venv/bin/python -m pip install -q -c launchers/constraints.txt -e ".[$extra]"
  touch ".venv/ready-$extra-$stamp"
}
