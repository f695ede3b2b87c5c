#!/bin/sh
# A recipe on all GPUs of one machine, for example:
#     GPUS=8 sh one_machine.sh paper-commonsense method=eva --out /shared/runs/commonsense-eva
set -eu
exec torchrun --standalone --nproc-per-node "${GPUS:-8}" -m evatune train "$@"
