#!/bin/bash
#SBATCH --job-name=heat-source
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=32
#SBATCH --cpus-per-task=1
#SBATCH --distribution=block:block
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#
# An inversion on two nodes that continues from its checkpoint when the time limit is reached: sbatch docs/tutorials/two_nodes.sh
# Set PINT_FEM to the checkout, and SHARED to a folder that all nodes see. GRID, STEPS and LAUNCH may be set, too.
set -euo pipefail

PINT_FEM=${PINT_FEM:-$SLURM_SUBMIT_DIR}
SHARED=${SHARED:-$SLURM_SUBMIT_DIR/results}
GRID=${GRID:-auto}
STEPS=${STEPS:-4096}
LAUNCH=${LAUNCH:-srun --mpi=pmix --cpu-bind=cores}
cd "$PINT_FEM"
mkdir -p "$SHARED"
# shellcheck disable=SC1091
source "${PINT_FEM_VENV:-.venv}/bin/activate"

# one thread per rank: the kernels are serial, and threads of BLAS would compete for the cores of other ranks
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1

# compiled kernels on the disk of each node, from one archive that the first job has made
export FIREDRAKE_CACHE_DIR=${TMPDIR:-/tmp}/pint_fem_${SLURM_JOB_ID}
export KERNELS=$SHARED/kernels.tar
srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 bash -c '
    mkdir -p "$FIREDRAKE_CACHE_DIR"
    if [ -f "$KERNELS" ]; then tar -C "$FIREDRAKE_CACHE_DIR" -xf "$KERNELS"; fi'

# five minutes before the time limit: go back to the queue; the checkpoint is that of the last complete iteration
continue_later() {
    echo "time limit: the job goes on from $SHARED/run.h5"
    scontrol requeue "$SLURM_JOB_ID"
}
trap continue_later USR1

$LAUNCH python demos/heat_source_inversion.py --method trust-region --grid "$GRID" --steps "$STEPS" \
    --checkpoint "$SHARED/run.h5" --out "$SHARED/heat_source" &
wait $!

if [ ! -f "$KERNELS" ]; then
    tar -C "$FIREDRAKE_CACHE_DIR" -cf "$KERNELS.new" . && mv "$KERNELS.new" "$KERNELS"
fi
