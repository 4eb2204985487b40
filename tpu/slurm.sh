#!/usr/bin/env bash
# A run on a SLURM cluster, one process a GPU; jax finds the others by itself:
#
#   sbatch tpu/slurm.sh -m experiments.arithmetic --output_dir /shared/runs/first
#
# The output directory must be one that every node sees. Before the time limit,
# and when the job is preempted, the run gets SIGTERM, saves and exits with 75;
# the job is then queued again and goes on from its checkpoint.
#SBATCH --job-name=jaxrl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=jaxrl-%j.log
set -uo pipefail
case " $* " in
  *' --output_dir'*) ;;
  *)
    echo 'error: no --output_dir; give one that every node sees, to go on after a stop' >&2
    exit 2
    ;;
esac

# the others notice a task that fails by their heartbeat: no signal may cut a save
srun --kill-on-bad-exit=0 "${PYTHON:-python}" "$@" --resume auto
status=$?
if [ "$status" = 75 ]; then
  echo 'stopped by a signal, state saved: queued again'
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
