#!/bin/bash
#SBATCH --job-name=one
#SBATCH --output=/shared/home/ada/runs/one-%j.log
#SBATCH --open-mode=append
#SBATCH --chdir=/shared/home/ada
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --gpus-per-node=2
#SBATCH --mem=65536M
#SBATCH --time=1-01:00:00
#SBATCH --partition=gpu
#SBATCH --account=lab
#SBATCH --qos=low
#SBATCH --constraint=a100&ib
#SBATCH --signal=TERM@55
#SBATCH --requeue
#SBATCH --exclude=node7
set -euo pipefail

# Slurm sends SIGTERM to the commands on the hosts: before the time limit, and when the job is preempted or
# cancelled. They save and end. It is not passed on from here, since a second one would end them at once, and
# srun makes a SIGKILL of it: this shell has to outlive them and do what their exit code asks for.
trap : TERM

export GREETING='it'"'"'s; $HOME `here`'
recipe=/shared/home/ada/runs/one"-$SLURM_JOB_ID.yaml"
faults=/shared/home/ada/runs/one"-$SLURM_JOB_ID.faults"
max_faults=3
cat >"$recipe" <<'END_OF_RECIPE'
name: smoke
...: ...
END_OF_RECIPE

# On the first host, at a port that other jobs are unlikely to have.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
endpoint=${hosts%%$'\n'*}:$((20000 + SLURM_JOB_ID % 10000))

echo "metaloom: start $((${SLURM_RESTART_COUNT:-0} + 1)) of job $SLURM_JOB_ID, hosts meet at $endpoint"
code=0
srun --nodes=3 --ntasks=3 --ntasks-per-node=1 --cpus-per-task=4 --kill-on-bad-exit=0 --wait=0 \
  /opt/metaloom/bin/python -m metaloom.cli train "$recipe" --run /shared/home/ada/runs/one \
  launcher.num_processes=2 "launcher.hosts.endpoint=$endpoint" launcher.hosts.num_hosts=3 || code=$?

again() {
  # Slurm decides about a job that it has cancelled, or is taking away: that one does not run any more.
  if [[ " $(scontrol show job --oneliner "$SLURM_JOB_ID" || true) " != *" JobState=RUNNING "* ]]; then
    echo "metaloom: Slurm has ended the job, so it is not put back into the queue from here"
  elif scontrol requeue "$SLURM_JOB_ID"; then
    echo "metaloom: the job is back in the queue and will go on from its last checkpoint"
  else
    echo "metaloom: the job could not be put back into the queue: submit it again with --resume"
  fi
}

case $code in
  0)
    rm -f "$faults" "$recipe"
    echo "metaloom: done"
    ;;
  75)
    echo "metaloom: stopped and saved"
    again
    ;;
  2 | 3 | 4 | 5 | 6)
    echo "metaloom: exit code $code: trying again would not help, see above"
    ;;
  129 | 130)
    echo "metaloom: interrupted"
    ;;
  *)
    count=$(($(cat "$faults" 2>/dev/null || echo 0) + 1))
    echo "$count" >"$faults"
    if ((count > max_faults)); then
      echo "metaloom: exit code $code, fault $count of the job: given up"
    else
      echo "metaloom: exit code $code, fault $count of at most $max_faults"
      again
    fi
    ;;
esac
exit "$code"
