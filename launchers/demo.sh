#!/usr/bin/env bash
# From a fresh clone to a trained FiTv2, on a machine without a GPU, or with one, which it then does not use: writes
# shards of real photographs, trains in two processes, kills them half way, resumes, and leaves pictures and an MLflow
# run.
#
#   bash launchers/demo.sh [STEPS]    STEPS, at least 100, instead of those of configs/demo.yaml
#
# It writes to .venv, data/ and runs/ of the repository; a second call makes a new run beside the first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launchers/venv.sh

config=configs/demo.yaml
steps=${1:-$(sed -nE 's/^train: \{steps: ([0-9]+),.*/\1/p' "$config")}
[[ $steps =~ ^[1-9][0-9]{2,6}$ ]] || die "$steps is no number of steps: give one from 100 on, as in launchers/demo.sh 200"
# Of 1,000 steps, the intervals of the config.
length=(train.steps="$steps" checkpoint.every_steps=$((steps / 10)) validation.every_steps=$((steps / 10))
  sampling.every_steps=$((steps / 5)))
run=runs/demo-$(date +%Y%m%d-%H%M%S)

last_commit() {
  .venv/bin/fitv2 checkpoint list "$run" --json 2>/dev/null |
    .venv/bin/python -c 'import json, sys; print(max((c["step"] for c in json.load(sys.stdin)), default=0))' 2>/dev/null ||
    echo 0
}

# Sends SIGKILL to the processes that train, not to their supervisor.
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

say "Forecasting memory and time: fitv2 plan"
.venv/bin/fitv2 plan "$config" "${length[@]}" --gpus-per-node 2

say "Training $steps steps in two processes, which will be killed half way"
# One thread per process: two processes on two cores.
OMP_NUM_THREADS=1 .venv/bin/fitv2 train "$config" run="$run" "${length[@]}" --supervise --processes 2 &
training=$!
trap end_training EXIT
while [ "$(last_commit)" -lt $((steps / 2)) ]; do
  kill -0 $training 2>/dev/null || { wait $training; exit 1; }
  sleep 2
done
say "Killing both processes with kill -9, after the commit at step $(last_commit)"
sleep 3
kill_training

say "The supervisor starts another attempt, which continues from the last commit"
wait $training
trap - EXIT
.venv/bin/fitv2 track sync "$run"
.venv/bin/fitv2 status "$run"

cat <<TEXT

==> Done. Results:

  pictures    $run/samples/, grids of samples from the EMA weights; the last one is
              $run/samples/$(printf '%08d' "$steps").png
  curves      .venv/bin/mlflow server --backend-store-uri sqlite:///$PWD/runs/mlflow.db --port 5000
              and http://127.0.0.1:5000 in a browser: one continuous run, across the restart
  more        .venv/bin/fitv2 sample $run --size 128x256 --cfg 3 --out more.png
TEXT
