#!/usr/bin/env bash
# Trains FiTv2, FiT, SiT and DiT at the size of a laptop on the same photographs, with equal numbers of images, and
# compares them at sizes that they were trained on and at others: pictures side by side, and the loss on held-out
# photographs by size.
#
#   bash launchers/family.sh [STEPS]    STEPS, at least 100, instead of 1,000
#
# It writes to .venv, data/ and runs/family/ of the repository. A second call continues what the first has begun.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launchers/venv.sh

steps=${1:-1000}
[[ $steps =~ ^[1-9][0-9]{2,6}$ ]] || die "$steps is no number of steps: give one from 100 on, as in launchers/family.sh 200"
folder=runs/family/$steps
families=(fitv2 fit sit dit)
sizes=(160x160 112x224 80x80 256x256) # the first has the 100 tokens of training
tokens=(25 49 100 196 256)           # of the held-out photographs, at most
export OMP_NUM_THREADS=1

config_of() { [ "$1" = fitv2 ] && echo configs/demo.yaml || echo "configs/demo_$1.yaml"; }

make_venv demo

say "Cutting 2,000 crops out of the photographs that scikit-image and scikit-learn ship, in two scales"
[ -f data/crops/CREDITS.txt ] || .venv/bin/python -m launchers.demo_images data/crops --crops 2000
[ -f data/crops-2x/CREDITS.txt ] || .venv/bin/python -m launchers.demo_images data/crops-2x --crops 2000 --scale 2

say "Encoding them to shards: to train on, and the same held-out ones in ${#tokens[@]} sizes"
.venv/bin/fitv2 shard write data/crops data/photographs --max-tokens 100 --holdout 0.02
for count in "${tokens[@]}"; do
  .venv/bin/fitv2 shard write data/crops-2x "data/family-$count" --max-tokens "$count" --holdout 0.02
done

for family in "${families[@]}"; do
  say "Training $family for $steps steps in two processes"
  .venv/bin/fitv2 train "$(config_of "$family")" run="$folder/$family" train.steps="$steps" optimizer.lr=1e-3 \
    validation.every_steps=0 sampling.every_steps=0 tracking.uri=none tracking.experiment=family --supervise --processes 2
done

say "Pictures and losses at sizes that were trained on and at others"
for family in "${families[@]}"; do
  modes=(auto)
  case $family in sit | dit) modes=(none ei pi) ;; esac
  for mode in "${modes[@]}"; do
    for size in "${sizes[@]}"; do
      rm -f "$folder/$family-$mode-$size.png"
      .venv/bin/fitv2 sample "$folder/$family" --size "$size" --columns 3 --cfg 2 "sampling.sincos=$mode" \
        --out "$folder/$family-$mode-$size.png"
    done
    for count in "${tokens[@]}"; do
      held=data/family-$count/holdout
      .venv/bin/fitv2 validate "$folder/$family" data.url="$held" validation.url="$held" validation.images=40 \
        validation.timesteps=16 model.sincos.mode="${mode/auto/none}" --json >"$folder/$family-$mode-$count.json"
    done
  done
done
.venv/bin/python -m launchers.family_report "$folder"
say "Done: $folder/family.png and $folder/family.md"
