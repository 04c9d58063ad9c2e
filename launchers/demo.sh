#!/usr/bin/env bash
# From a fresh clone to a trained FiTv2, on a machine without a GPU: shards real photographs, trains on two processes,
# is killed half way, resumes by itself, and leaves pictures and an MLflow run. Takes no arguments.
#
# Everything it makes lies in .venv, data/ and runs/ of the repository; run again, it begins a new run beside the old.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launchers/venv.sh

config=configs/demo.yaml
steps=$(sed -nE 's/^train: \{steps: ([0-9]+),.*/\1/p' "$config")
run=runs/demo-$(date +%Y%m%d-%H%M%S)

last_commit() {
  .venv/bin/fitv2 checkpoint list "$run" --json 2>/dev/null |
    .venv/bin/python -c 'import json, sys; print(max((c["step"] for c in json.load(sys.stdin)), default=0))' 2>/dev/null ||
    echo 0
}

# SIGKILL to the processes that train, not to the one that supervises them.
kill_training() {
  local process words
  for process in /proc/[0-9]*; do
    words=$(tr '\0' ' ' 2>/dev/null <"$process/cmdline") || continue
    if [[ "$words " == *"run=$run "* && $words != *--supervise* ]]; then
      kill -KILL "${process#/proc/}" 2>/dev/null || true
    fi
  done
}

end_training() {
  kill -KILL "$training" 2>/dev/null || true
  kill_training
}

make_venv demo

say "Cutting 2,000 crops out of the photographs that scikit-image and scikit-learn ship"
[ -f data/crops/CREDITS.txt ] || .venv/bin/python -m launchers.demo_images data/crops --crops 2000

say "Encoding them to shards: fitv2 shard write"
.venv/bin/fitv2 shard write data/crops data/photographs --max-tokens 100 --holdout 0.02
.venv/bin/fitv2 shard inspect data/photographs

say "What the run will need: fitv2 plan"
.venv/bin/fitv2 plan "$config" --gpus-per-node 2

say "Training $steps steps on two processes, which will be killed half way"
# One thread a process: two processes on two cores.
OMP_NUM_THREADS=1 .venv/bin/fitv2 train "$config" run="$run" --supervise --processes 2 &
training=$!
trap end_training EXIT
while [ "$(last_commit)" -lt $((steps / 2)) ]; do
  kill -0 $training 2>/dev/null || { wait $training; exit 1; }
  sleep 2
done
say "kill -9 to all of them, somewhere after the commit at step $(last_commit)"
sleep 3
kill_training

say "The supervisor sees it and begins another attempt, which goes on from the last commit"
wait $training
trap - EXIT
.venv/bin/fitv2 track sync "$run"
.venv/bin/fitv2 status "$run"

cat <<TEXT

==> Done. What to look at:

  pictures    $run/samples/, one grid every so often, from the EMA weights; the last is
              $run/samples/$(printf '%08d' "$steps").png
  curves      .venv/bin/mlflow server --backend-store-uri sqlite:///$PWD/runs/mlflow.db --port 5000
              and http://127.0.0.1:5000 in a browser: one unbroken run, restart and all
  more        .venv/bin/fitv2 sample $run --size 128x256 --cfg 3 --out more.png
TEXT
