#!/usr/bin/env bash
# Installs what is missing, runs the checks and the tests.
#
#   bash tests/run.sh            everything in its short form (what CI runs)
#   bash tests/run.sh --fast     without the tests that start servers or launchers
#   bash tests/run.sh --long     the full figures as well
#   bash tests/run.sh --gpu      only the tests that need a GPU, which no other test sees
#
# Anything behind the options goes to pytest, as in: bash tests/run.sh --fast -k resume
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launchers/venv.sh

marks="not long"
case "${1:-}" in
  --fast) marks="not long and not services" && shift ;;
  --long) marks="" && shift ;;
  --gpu) marks="gpu" && shift ;;
esac

# The services' programs come from Debian's packages. Nothing is started by installing them, for the tests do that.
install_services() {
  local missing=()
  command -v radosgw >/dev/null || missing+=(radosgw)
  PATH=$PATH:/usr/sbin command -v ceph-mon >/dev/null || missing+=(ceph-mon)
  PATH=$PATH:/usr/sbin command -v ceph-osd >/dev/null || missing+=(ceph-osd)
  PATH=$PATH:/usr/sbin command -v slurmctld >/dev/null || missing+=(slurmctld)
  PATH=$PATH:/usr/sbin command -v slurmd >/dev/null || missing+=(slurmd)
  command -v sbatch >/dev/null || missing+=(slurm-client)
  PATH=$PATH:/usr/sbin command -v munged >/dev/null || missing+=(munge)
  [ ${#missing[@]} -gt 0 ] || return 0
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    say "Tests on real servers are left out: ${missing[*]} missing, and only root can apt-get install"
    return 0
  fi
  say "Installing ${missing[*]}"
  local policy=/usr/sbin/policy-rc.d made=""
  if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy && made=yes
  fi
  apt-get update -qq || true
  DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends "${missing[@]}" >/dev/null ||
    say "apt-get could not install ${missing[*]}: the tests that need them are left out"
  [ -z "$made" ] || rm $policy
}

make_venv test
if [ "$marks" = gpu ]; then # one after the other: they measure how much of its memory they take
  OMP_NUM_THREADS=1 exec .venv/bin/python -m pytest -m gpu "$@"
fi
[[ $marks == *"not services"* ]] || install_services

say "ruff"
.venv/bin/ruff check .
.venv/bin/ruff format --check .

say "Types, with the optional extras and without them"
.venv/bin/pyrefly check
extras=(botocore deepspeed diffusers megatron s3fs skimage sklearn streaming triton webdataset)
.venv/bin/pyrefly check $(printf -- '--replace-imports-with-any %s.* ' "${extras[@]}")

say "Import order of the rooms"
.venv/bin/lint-imports

say "pytest"
# One thread a process: tests start several ranks on few cores. Three tests at once on two cores, since many wait a lot.
OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 3 --dist loadscope --no-loadscope-reorder -m "$marks" --durations 40 "$@"

[ -z "$marks" ] && [ $# = 0 ] || exit 0
say "Mutants: first the named ones, then 120 that are drawn"
results=$(mktemp -d)
.venv/bin/python -m tests.mutation --named --out "$results/named.jsonl"
.venv/bin/python -m tests.mutation --seed 0 --count 120 --out "$results/drawn.jsonl"
