#!/bin/sh
# Make the committed logs, pictures and notebooks again, after the base or the defaults have changed:
#     sh notebooks/remake.sh
# It takes about five hours of one core. What is complete in runs/ is not trained again: delete runs/ first. The base is
# made by `python -m tools.pretrain`, the ControlNets in models/ as their READMEs say; the logs forecast-0 to -9 are of
# older settings and stay.
set -e
cd "$(dirname "$0")/.."

python train.py
cp runs/controlnet/previews/step-240.png docs/miniature.png
python notebooks/experiments.py
python notebooks/amplitude.py
python notebooks/fill50k.py
python notebooks/drawing.py
python -m tools.dusk
python tests/capture_page.py runs/seed-0 docs
python train.py --output-dir runs/slow --snapshot-steps 0 --checkpointing-steps 20 --checkpoints-total-limit 100 \
    --max-train-steps 300 --train-batch-size 8 --learning-rate 1e-3 --cooldown 0
python convergence.py --controlnet runs/slow --pairs 16 --output docs/listen.png
for notebook in notebooks/[1-5]_*.ipynb; do jupyter execute --inplace "$notebook"; done
