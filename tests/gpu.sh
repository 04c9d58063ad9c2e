#!/usr/bin/env bash
# Measures this program on one GPU, on a machine that may have little more than torch and reaches nothing.
#
#   bash tests/gpu.sh 1            ceilings of the device, the GPU tests, a step of FiTv2-3B/2 and its kernels
#   bash tests/gpu.sh 2            the released way side by side; XL/2; B/2
#   bash tests/gpu.sh 3            peaks of memory, 1,024 tokens, fewer images
#   bash tests/gpu.sh 4            other ways of training: faster keys of the layout, fp8, FlashAttention 4
#   bash tests/gpu.sh --dry-run 1  the same on the CPU, in the smallest sizes, to try the script
#   bash tests/gpu.sh report A B   one results.json and results.md of calls whose results lie in several folders
#   bash tests/gpu.sh wheels 3.12  before, where there is a network: packages for a machine with that Python
#
# Each part ends within ten minutes (--seconds), and begins with what matters most; one after the other they find what
# was compiled before. All add to one folder, gpu-results or --out FOLDER: results.json, results.md, log.txt. What lies
# in tests/gpu/wheels is installed into a temporary folder; nothing is downloaded.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)
python=${FITV2_PYTHON:-$python}
wheels=tests/gpu/wheels

if [ "${1:-}" = wheels ]; then
  platforms=(--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64)
  exec "$python" -m pip download -q --only-binary=:all: --implementation cp --python-version "${2:?which Python}" \
    "${platforms[@]}" -c launchers/constraints.txt -d $wheels pydantic zstandard xxhash pyyaml pytest hypothesis
fi

export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
if compgen -G "$wheels/*.whl" >/dev/null; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" $wheels/*.whl
  PYTHONPATH=$site:$PYTHONPATH
fi
"$python" -m tests.gpu "$@"
