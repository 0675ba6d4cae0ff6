# Two hosts on one machine, for the scripts beside this one: `source hosts.sh; hosts_up; on node1 COMMAND...; hosts_down`.
#
# A host is a network, a host name and a /tmp of its own (namespaces); a virtual cable joins the two, 10.77.0.1 (node1)
# and 10.77.0.2 (node2). Everything else, this repository included, is shared, as a cluster's file system would be.
# $WORK is a directory that both see. Needs root.

WORK=
HOSTS="node1 node2"

fail() {
  echo "FAILED: $*" >&2
  exit 1
}

# need COMMAND PACKAGE: stops with what to install.
need() {
  command -v "$1" >/dev/null || { echo "missing: $1 (apt-get install $2)" >&2; exit 77; }
}

hosts_up() {
  [ "$(id -u)" = 0 ] || { echo "needs root, for namespaces" >&2; exit 77; }
  need ip iproute2
  need unshare util-linux
  case "$REPOSITORY" in /tmp/*) echo "needs a checkout outside of /tmp, which each host has its own of" >&2; exit 77 ;; esac
  WORK=$(mktemp -d -p /var/tmp lamella-cluster.XXXXXX)
  trap hosts_down EXIT
  trap 'exit 130' INT TERM
  printf '127.0.0.1 localhost\n10.77.0.1 node1\n10.77.0.2 node2\n' >"$WORK/hosts"
  for host in $HOSTS; do
    unshare --net --uts --mount sleep infinity &
    disown
    echo $! >"$WORK/$host.pid"
  done
  sleep 0.2
  ip link add eth0 netns "$(cat "$WORK/node1.pid")" type veth peer name eth0 netns "$(cat "$WORK/node2.pid")"
  number=1
  for host in $HOSTS; do
    on $host sh -c "hostname $host && mount --bind $WORK/hosts /etc/hosts && mount -t tmpfs tmpfs /tmp &&
      ip address add 10.77.0.$number/24 dev eth0 && ip link set eth0 up && ip link set lo up" || fail "setting up $host"
    number=$((number + 1))
  done
}

# on HOST COMMAND...: runs a command there.
on() {
  host_pid=$(cat "$WORK/$1.pid")
  shift
  nsenter --target "$host_pid" --net --uts --mount --wd="$PWD" "$@"
}

# processes HOST: the process ids there, except for the one that holds the host.
processes() {
  holder=$(cat "$WORK/$1.pid")
  network=$(readlink "/proc/$holder/ns/net")
  for process in /proc/[0-9]*; do
    [ "$(readlink "$process/ns/net" 2>/dev/null)" = "$network" ] || continue
    [ "${process#/proc/}" = "$holder" ] || echo "${process#/proc/}"
  done
}

# nothing_left PATTERN SECONDS: fails if a process whose command line matches is on either host after that time.
nothing_left() {
  for _ in $(seq $(($2 * 10))); do
    left=
    for host in $HOSTS; do
      for process in $(processes "$host"); do
        { tr "\\0" " " <"/proc/$process/cmdline"; } 2>/dev/null | grep -q -- "$1" && left="$left $process"
      done
    done
    [ -z "$left" ] && return 0
    sleep 0.1
  done
  fail "processes left after $2 s:$left"
}

hosts_down() {
  status=$?
  trap - EXIT INT TERM
  for host in $HOSTS; do
    [ -f "$WORK/$host.pid" ] || continue
    processes "$host" | xargs -r kill -9 2>/dev/null
    kill -9 "$(cat "$WORK/$host.pid")" 2>/dev/null
  done
  wait 2>/dev/null
  rm -rf "$WORK"
  exit $status
}
