#!/bin/bash
# Slurm (slurmctld, two slurmd on two hosts, munge): runs examples/slurm/lamella.sbatch.
#
#     tests/cluster/slurm.sh [PYTHON]            exit code 0: all worked; 77: something is missing here
#
# PYTHON: of the environment that holds Lamella and MPI (its bin directory is searched first); default: .venv's.
# Needs root and Debian's packages: apt-get install slurmctld slurmd slurm-client munge libpmix2
# The daemons run from a directory of their own; an installed Slurm or munge is neither used nor changed.
set -u
REPOSITORY=$(cd "$(dirname "$0")/../.." && pwd)
PYTHON=${1:-$REPOSITORY/.venv/bin/python}
export OMP_NUM_THREADS=1
cd "$REPOSITORY" || exit 1
source tests/cluster/hosts.sh
for package in slurmctld slurmd munge; do need ${package/%munge/munged} $package; done
need sbatch slurm-client
hosts_up

slurm_up() {
  mkdir "$WORK/state"
  dd if=/dev/urandom of="$WORK/munge.key" bs=1024 count=1 2>/dev/null
  chmod 400 "$WORK/munge.key"
  cat >"$WORK/slurm.conf" <<END
ClusterName=lamella
SlurmctldHost=node1
AuthType=auth/munge
AuthInfo=socket=/tmp/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$WORK/state
SlurmdSpoolDir=/tmp/slurmd
SlurmctldPidFile=/tmp/slurmctld.pid
SlurmdPidFile=/tmp/slurmd.pid
SlurmctldLogFile=$WORK/slurmctld.log
SlurmdLogFile=$WORK/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=5
NodeName=node[1-2] CPUs=1
PartitionName=main Nodes=ALL Default=YES State=UP
END
  export SLURM_CONF=$WORK/slurm.conf
  for host in $HOSTS; do
    on $host munged --force --socket=/tmp/munge.socket --key-file="$WORK/munge.key" --pid-file=/tmp/munged.pid \
      --log-file="$WORK/munged.$host.log" --seed-file=/tmp/munge.seed || fail "munged on $host"
  done
  on node1 slurmctld -c || fail "slurmctld"
  for host in $HOSTS; do on $host slurmd -c || fail "slurmd on $host"; done
  for _ in $(seq 100); do
    [ "$(on node1 sinfo --noheader --format=%D --states=idle)" = 2 ] && return
    sleep 0.1
  done
  fail "the nodes are not idle: $(on node1 sinfo; tail -n 5 "$WORK"/*.log)"
}

# batch COMMAND...: runs the documented batch script with one task on each host; its output goes to $WORK/log.
batch() {
  rm -f "$WORK/log"
  on node1 sbatch --quiet --wait --nodes=2 --ntasks-per-node=1 --output="$WORK/log" \
    --export=ALL,VENV="$(dirname "$(dirname "$PYTHON")")" examples/slurm/lamella.sbatch "$@"
}

# start_waiting: a batch job whose script waits for a signal, in the background; its process is $waiting.
start_waiting() {
  batch "$PYTHON" tests/support/launched_script.py 2 wait_for_signal &
  waiting=$!
  for _ in $(seq 200); do grep -q '"script"' "$WORK/log" 2>/dev/null && return; sleep 0.1; done
  fail "the job does not start: $(cat "$WORK/log"; tail -n 5 "$WORK"/slurm*.log)"
}

slurm_up
echo "== $(on node1 sinfo --version), $(on node1 srun --mpi=list 2>&1 | tr '\n' ' ')"

echo "== sessions one after another and side by side, one of them with a killed worker"
batch "$PYTHON" tests/support/launched_script.py 2 sessions
code=$?
[ $code = 7 ] || fail "exit code $code: $(cat "$WORK/log"; tail -n 5 "$WORK"/slurm*.log)"
grep -q 'rank 1 (pid [0-9]* on node2) was killed by signal 9' "$WORK/log" || fail "$(cat "$WORK/log")"

echo "== nothing outlives a killed script, not even a stopped worker on the other host"
batch "$PYTHON" tests/support/launched_script.py 2 orphan
code=$?
[ $code = 137 ] || fail "exit code $code: $(cat "$WORK/log")"
nothing_left "lamella_executor\|lamella-launch\|launched_script" 5
grep -q 'it is stopped' "$WORK/log" || fail "$(cat "$WORK/log")"

echo "== scancel --signal=TERM is the script's to answer, with its workers still there to end in order"
start_waiting
on node1 scancel --signal=TERM --name=lamella
wait $waiting
[ $? = 7 ] || fail "$(cat "$WORK/log")"
grep -q '"signal": 15' "$WORK/log" || fail "$(cat "$WORK/log")"
nothing_left "lamella_executor\|lamella-launch\|launched_script" 5

echo "== scancel ends everything"
start_waiting
on node1 scancel --name=lamella
nothing_left "lamella_executor\|lamella-launch\|launched_script" 5
wait $waiting && fail "it should not have worked"

echo "== an agent that is killed takes the job with it"
start_waiting
for process in $(processes node2); do
  grep -q "lamella-launch" "/proc/$process/cmdline" 2>/dev/null && kill -9 "$process"
done
nothing_left "lamella_executor\|lamella-launch\|launched_script" 10
wait $waiting && fail "it should not have worked"

echo "== a script without lamella-launch, and a srun without MPI, are told what to do"
on node1 srun --nodes=2 --ntasks=2 --mpi=none "$PYTHON" tests/support/launched_script.py 2 sessions >"$WORK/log" 2>&1 &&
  fail "it should not have worked"
grep -q "only rank 0 can start multi-node session, got 1.*lamella-launch" "$WORK/log" || fail "$(cat "$WORK/log")"
grep -q "started 2 times on several machines.*lamella-launch" "$WORK/log" || fail "$(cat "$WORK/log")"
LAMELLA_SLURM_MPI=none batch "$PYTHON" -c "pass" && fail "it should not have worked"
# Open MPI 4 stops by itself, others take each rank for a job of its own.
grep -q "rank [01] of 2 (SLURM_PROCID) is alone for the MPI library\|direct launched using \"srun\"" "$WORK/log" ||
  fail "$(cat "$WORK/log")"

echo "== a model over two ranks gives the tokens of one"
batch "$PYTHON" tests/cluster/generate.py
code=$?
[ $code = 0 ] || fail "exit code $code: $(cat "$WORK/log")"
cat "$WORK/log"
nothing_left "lamella_executor\|lamella-launch\|generate.py" 5
echo "all worked"
