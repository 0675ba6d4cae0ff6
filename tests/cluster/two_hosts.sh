#!/bin/bash
# mpirun across two hosts (network namespaces): sessions, a killed script, and a model over two ranks.
#
#     tests/cluster/two_hosts.sh [PYTHON]        exit code 0: all worked; 77: something is missing here
#
# PYTHON: of the environment that holds Lamella and MPI (its bin directory is searched first); default: .venv's.
set -u
REPOSITORY=$(cd "$(dirname "$0")/../.." && pwd)
PYTHON=${1:-$REPOSITORY/.venv/bin/python}
export PATH="$(dirname "$PYTHON"):$PATH"
export OMP_NUM_THREADS=1
for owner in OMPI PRTE; do export ${owner}_ALLOW_RUN_AS_ROOT=1 ${owner}_ALLOW_RUN_AS_ROOT_CONFIRM=1; done
cd "$REPOSITORY" || exit 1
source tests/cluster/hosts.sh
need mpirun openmpi-bin
hosts_up

# What Open MPI uses instead of ssh to start its daemon on the other host.
cat >"$WORK/remote_shell" <<END
#!/bin/sh
host=\$1; shift
exec nsenter --target "\$(cat $WORK/\$host.pid)" --net --uts --mount sh -c "\$*"
END
chmod +x "$WORK/remote_shell"

export PRTE_MCA_plm_ssh_agent=$WORK/remote_shell OMPI_MCA_plm_rsh_agent=$WORK/remote_shell # Open MPI 5, 4

# launch COMMAND...: two ranks, one on each host.
launch() {
  on node1 mpirun -n 2 --host node1:1,node2:1 --bind-to none -x PATH -x OMP_NUM_THREADS "$@" 2>"$WORK/stderr"
}

echo "== a script on two hosts without lamella-launch is told what to do"
launch "$PYTHON" tests/support/launched_script.py 2 sessions >"$WORK/stdout" && fail "it should not have worked"
grep -q "lamella-launch" "$WORK/stderr" || fail "no remedy: $(cat "$WORK/stderr")"

echo "== sessions one after another and side by side, one of them with a killed worker"
launch lamella-launch "$PYTHON" tests/support/launched_script.py 2 sessions >"$WORK/stdout"
code=$?
[ $code = 7 ] || fail "exit code $code: $(cat "$WORK/stdout" "$WORK/stderr")"
grep -q 'rank 1 (pid [0-9]* on node2) was killed by signal 9' "$WORK/stdout" || fail "$(cat "$WORK/stdout")"

echo "== nothing outlives a killed script, not even a stopped worker on the other host"
launch lamella-launch "$PYTHON" tests/support/launched_script.py 2 orphan >"$WORK/stdout"
code=$?
[ $code = 137 ] || fail "exit code $code: $(cat "$WORK/stdout" "$WORK/stderr")"
nothing_left "lamella_executor\|lamella-launch\|launched_script" 5
grep -q 'it is stopped' "$WORK/stdout" || fail "$(cat "$WORK/stdout")"

echo "== a forced address that the other host cannot reach is named with its remedy"
LAMELLA_HOST_ADDRESS=127.0.0.1 launch lamella-launch "$PYTHON" tests/support/launched_script.py 2 sessions \
  >"$WORK/stdout" && fail "it should not have worked"
grep -q "cannot reach rank 0 at 127.0.0.1.*LAMELLA_HOST_ADDRESS" "$WORK/stderr" || fail "$(cat "$WORK/stderr")"

echo "== a model over two ranks gives the tokens of one"
launch lamella-launch "$PYTHON" tests/cluster/generate.py "$WORK/model" >"$WORK/stdout"
code=$?
[ $code = 0 ] || fail "exit code $code: $(cat "$WORK/stdout" "$WORK/stderr")"
cat "$WORK/stdout"
nothing_left "lamella_executor\|lamella-launch\|generate.py" 5
echo "all worked"
