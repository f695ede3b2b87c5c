#!/bin/sh
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
# A recipe on all GPUs of several machines, for example (--out on a disk that all of them see):
#     sbatch slurm.sh paper-commonsense method=eva training.batch_size=16 training.accumulate=2 --out /shared/runs/commonsense-eva
set -eu
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec srun --cpus-per-task "${SLURM_CPUS_PER_TASK:-64}" torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:29500" \
    -m evatune train "$@"
