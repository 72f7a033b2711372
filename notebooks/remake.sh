#!/bin/sh
# Make the committed logs, pictures and notebooks again, after the base or the defaults have changed:
#     sh notebooks/remake.sh
# What is complete in runs/ is not made again: delete runs/ first. The base is made by `python -m tools.pretrain`, the
# ControlNets in models/ as their READMEs say. No program draws docs/architecture.svg: a test compares it with the models.
set -e
cd "$(dirname "$0")/.."

train() { # in a folder, where one that was stopped goes on
    folder=$1 && shift
    python train.py --output-dir "$folder" "$@" $([ -d "$folder" ] && echo --resume-from-checkpoint latest)
}

train runs/controlnet
cp "$(ls -v runs/controlnet/previews/step-*.png | tail -n 1)" docs/miniature.png
python notebooks/experiments.py
python -m tools.dusk
python tests/capture_page.py runs/controlnet docs
for notebook in notebooks/[1-5]_*.ipynb; do jupyter execute --inplace "$notebook"; done
