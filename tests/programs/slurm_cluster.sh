#!/bin/bash
# A SLURM cluster of this machine alone, for tests: slurm_cluster.sh up|down FOLDER
# Needs root and Debian's slurm-wlm and munge; "up" installs them where apt-get can.
# Partitions: "low" (preempted by "high" with a notice and 120 s of grace) and "high".
set -euo pipefail
folder=$2
conf=$folder/slurm.conf

stop() {
  local file
  for file in "$folder/slurmd.pid" "$folder/slurmctld.pid" "$folder/munged.pid"; do
    if [ -f "$file" ]; then kill "$(cat "$file")" 2>/dev/null || true; fi
  done
}

install() {
  if command -v slurmctld >/dev/null && command -v munged >/dev/null; then return; fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends slurm-wlm munge
}

# more CPUs than there may be (config_overrides): tests are many small processes
configure() {
  local host memory
  host=$(hostname -s)
  memory=$(slurmd -C | sed -n 's/.*RealMemory=\([0-9]*\).*/\1/p')
  cat >"$conf" <<EOF
ClusterName=test
SlurmctldHost=$host
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SwitchType=switch/none
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldPort=16817
SlurmdPort=16818
SlurmdSpoolDir=$folder/spool
StateSaveLocation=$folder/state
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,sched_interval=5,bf_interval=5
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
JobAcctGatherType=jobacct_gather/none
KillWait=30
MinJobAge=3600
ReturnToService=2
NodeName=$host CPUs=4 RealMemory=$memory State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
EOF
}

start() {
  mkdir -p "$folder/state" "$folder/spool" "$folder/munge"
  install
  configure
  # a key of the test's own: nothing of the machine's munge is used or changed
  (umask 077 && head -c 1024 /dev/urandom >"$folder/munge/munge.key")
  munged --force --key-file="$folder/munge/munge.key" --socket="$folder/munge.socket" \
    --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" \
    --seed-file="$folder/munge/munged.seed"
  export SLURM_CONF=$conf
  slurmctld -f "$conf"
  slurmd -f "$conf" -N "$(hostname -s)"
  for _ in $(seq 60); do
    if sinfo --noheader --format=%T | grep -q idle; then exit 0; fi
    sleep 1
  done
  echo "no node became idle; see $folder/*.log" >&2
  exit 1
}

case "$1" in
up) start ;;
down) stop ;;
*) exit 2 ;;
esac
