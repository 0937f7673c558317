#!/bin/sh
# Many runs at once: tests/shots.txt through GNU parallel and through Slurm, with workers killed at random.
#
#     tests/many.sh RUYI
#
# What is not installed is skipped (Debian: parallel; slurm-wlm and munge, of which a cluster of this machine alone is
# started, with its own ports, files and keys, and ended). All shots must have the bytes of runs that nobody killed.
[ $# -eq 1 ] && [ -x "$1" ] || { echo "usage: tests/many.sh PATH_TO_RUYI" >&2; exit 2; }
program=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
cd "$(dirname "$0")/.." || exit 3
tmp=$(mktemp -d) || exit 3
list=tests/shots.txt
shots=$(wc -l <$list)
daemons=
killing=
trap 'kill $killing $daemons 2>/dev/null; wait; rm -rf "$tmp"' EXIT
trap 'exit 3' HUP INT TERM
passed=0
failed=0
skipped=0
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
# The program under a name of its own, so that nobody else's is killed.
ln -s "$program" "$tmp/worker" || exit 3
export RUYI="$tmp/worker -q -m weights/ruyi-tiny --size 64x64 --frames 24 --steps 6"

skip() { skipped=$((skipped + 1)); echo "skipped $1: $2"; }

# killer: ends a random worker by kill -9 now and then; a line for each in kills.
killer() {
    while sleep 0.7; do
        victim=$(pgrep -f "^$tmp/worker" | awk -v seed="$(date +%N)" 'BEGIN { srand(seed) } { p[NR] = $1 } END { print p[1 + int(rand() * NR)] }')
        [ -n "$victim" ] && kill -9 "$victim" 2>/dev/null && echo "$victim" >>"$1"
    done
}

# complete NAME FOLDER: every shot is there, as unbroken, and nothing else.
complete() {
    for file in "$tmp"/whole/*; do
        if cmp -s "$file" "$2/$(basename "$file")"; then passed=$((passed + 1))
        else failed=$((failed + 1)); echo "FAILED $1: $(basename "$file") is missing, or has other bytes"; fi
    done
    rest=$(ls "$2" | grep -v -e '\.tmp\.' -e '\.out$' -e kills | wc -l)
    if [ "$rest" -eq "$shots" ]; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "FAILED $1: other files: $(ls "$2")"; fi
    echo "$1: $shots shots, $(wc -l <"$2/kills") workers killed"
}

mkdir "$tmp/whole"
for n in $(seq "$shots"); do tests/shot.sh $list "$n" "$tmp/whole"; done

# ---------------------------------------------------------------- GNU parallel
if parallel --version 2>/dev/null | grep -q GNU; then
    mkdir "$tmp/parallel" && : >"$tmp/parallel/kills"
    killer "$tmp/parallel/kills" & killing=$!
    parallel --jobs 2 --retries 20 tests/shot.sh $list {} "$tmp/parallel" ::: $(seq "$shots") >"$tmp/log" 2>&1
    kill $killing
    wait $killing 2>/dev/null
    killing=
    complete parallel "$tmp/parallel"
else
    skip parallel "GNU parallel is not installed"
fi

# ---------------------------------------------------------------- Slurm
slurm_start() {
    port=$((20000 + $$ % 20000))
    mkdir "$tmp/state" "$tmp/spool"
    cat >"$tmp/slurm.conf" <<END
ClusterName=one
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$tmp/munge.socket
SlurmctldPort=$port
SlurmdPort=$((port + 1))
StateSaveLocation=$tmp/state
SlurmdSpoolDir=$tmp/spool
SlurmctldPidFile=$tmp/slurmctld.pid
SlurmdPidFile=$tmp/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=5
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
    export SLURM_CONF="$tmp/slurm.conf"
    dd if=/dev/urandom of="$tmp/munge.key" bs=128 count=1 2>/dev/null && chmod 600 "$tmp/munge.key"
    munged --force --foreground --key-file="$tmp/munge.key" --socket="$tmp/munge.socket" --pid-file="$tmp/munge.pid" \
        --log-file="$tmp/munge.log" --seed-file="$tmp/munge.seed" >/dev/null 2>&1 & daemons="$daemons $!"
    slurmctld -D -f "$tmp/slurm.conf" >"$tmp/slurmctld.log" 2>&1 & daemons="$daemons $!"
    slurmd -D -f "$tmp/slurm.conf" >"$tmp/slurmd.log" 2>&1 & daemons="$daemons $!"
    for _ in $(seq 60); do
        sinfo -h -o %T 2>/dev/null | grep -q idle && return 0
        sleep 0.5
    done
    return 1
}

PATH=$PATH:/usr/sbin:/sbin
if ! { command -v slurmctld && command -v slurmd && command -v munged; } >/dev/null; then
    skip Slurm "slurmctld, slurmd or munged is not installed"
elif ! slurm_start; then
    skip Slurm "no cluster could be started here: $(grep -h error "$tmp"/slurm*.log | head -n 1)"
else
    mkdir "$tmp/slurm" && : >"$tmp/slurm/kills"
    job=$(sbatch --parsable --array=1-"$shots" --output="$tmp/slurm/%a.out" tests/shots.slurm $list "$tmp/slurm")
    killer "$tmp/slurm/kills" & killing=$!
    preempted=0
    for round in $(seq 300); do
        [ -n "$(squeue -h -j "$job" 2>/dev/null)" ] || break
        sleep 1
        case $round in
        3|6|9)                                      # what a preemption does: stopped, queued again
            task=$(squeue -h -j "$job" -t RUNNING -o %A | head -n 1)
            [ -n "$task" ] && scontrol requeue "$task" 2>/dev/null && preempted=$((preempted + 1)) ;;
        esac
    done
    kill $killing
    wait $killing 2>/dev/null
    killing=
    complete Slurm "$tmp/slurm"
    echo "Slurm: $preempted tasks preempted and queued again"
fi
echo "$passed passed, $failed failed$([ "$skipped" -gt 0 ] && echo ", $skipped skipped")"
[ "$failed" -eq 0 ]
