#!/bin/sh
# A real Slurm on this machine alone: munged, slurmctld and one slurmd on loopback, everything they write below FOLDER.
#
#   tests/slurm/start_slurm.sh start FOLDER     then: export SLURM_CONF=FOLDER/slurm.conf
#   tests/slurm/start_slurm.sh stop FOLDER
#
# Needs root, and Debian's packages: apt-get install slurm-wlm munge. It is made for containers: no cgroups, no systemd, no
# database, and the machine's own Slurm and munge, if it has any, are left alone (other ports, another socket, another key).
set -eu

usage() { sed -n '4,5s/^# *//p' "$0" >&2; exit 2; }
[ $# -eq 2 ] || usage
action=$1
mkdir -p "$2"
folder=$(cd "$2" && pwd)
node=$(hostname -s)

missing() { echo "error: $1" >&2; exit 2; }

stop() {
    for daemon in slurmd slurmctld munged; do
        if [ -s "$folder/$daemon.pid" ]; then kill "$(cat "$folder/$daemon.pid")" 2>/dev/null || true; fi
    done
}

# Waits up to 60 s for a command to succeed.
await() {
    tries=0
    until "$@" >/dev/null 2>&1; do
        tries=$((tries + 1))
        if [ $tries -ge 120 ]; then
            echo "error: gave up waiting for: $*" >&2
            tail -n 5 "$folder"/log/*.log >&2
            stop
            exit 1
        fi
        sleep 0.5
    done
}

port_in_use() { grep -qi ":$(printf '%04x' "$1") 0\{8\}:" /proc/net/tcp 2>/dev/null; }
free_port() {
    port=$1
    while port_in_use "$port"; do port=$((port + 1)); done
    echo "$port"
}

start() {
    [ "$(id -u)" -eq 0 ] || missing "slurmd has to be started by root"
    for daemon in munged slurmctld slurmd; do
        command -v "$daemon" >/dev/null || missing "$daemon is missing: apt-get install slurm-wlm munge"
    done
    mkdir -p "$folder/munge" "$folder/state" "$folder/spool" "$folder/log"
    # munge asks for a socket that all may reach and a key that only its owner may read.
    chmod 755 "$folder" "$folder/munge"
    [ -s "$folder/munge/key" ] || (umask 077 && head -c 1024 /dev/urandom >"$folder/munge/key")
    # --force: munge distrusts a folder below one that others may write to, as /tmp is.
    munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/log/munged.log" --seed-file="$folder/munge/seed" --num-threads=2 2>"$folder/log/munged.start.log"

    control=$(free_port 46817)
    daemon=$(free_port $((control + 1)))
    memory=$(slurmd -C | sed -n 's/.*RealMemory=\([0-9]*\).*/\1/p')
    # Twice as many processors as there are: a two-task job must find room on a machine of one core.
    processors=$((2 * $(getconf _NPROCESSORS_ONLN)))
    cat >"$folder/slurm.conf" <<END
ClusterName=loopback
SlurmctldHost=$node(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CredType=cred/munge
SlurmctldPort=$control
SlurmdPort=$daemon
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.log
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
MaxArraySize=1001
# Answers within a second, where a cluster saves its controller the work.
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000
InactiveLimit=0
KillWait=30
MinJobAge=300
SlurmdParameters=config_overrides
NodeName=$node NodeAddr=127.0.0.1 CPUs=$processors RealMemory=$memory State=UNKNOWN
PartitionName=local Nodes=$node Default=YES MaxTime=INFINITE State=UP
END
    export SLURM_CONF="$folder/slurm.conf"
    slurmctld -c
    await scontrol ping
    slurmd
    await sh -c "sinfo --noheader --format=%T | grep -qx idle"
    echo "SLURM_CONF=$folder/slurm.conf"
}

case $action in
start | stop) "$action" ;;
*) usage ;;
esac
