#!/bin/busybox sh
# Process 1 of the guest: use an export as a disk, then as swap, or as the root disk that this lies on, and print one
# line, PASS or FAIL.
#
# The host listens on the second serial port: this script writes a word, the host acts (folds) and answers "done".
# Arguments come on the kernel's command line: nbd.port, nbd.connections, nbd.work, nbd.restarts (of each kind),
# nbd.seconds, nbd.swapped (MiB), nbd.group (MiB).

/bin/busybox --install -s /bin
export PATH=/sbin:/bin

finish() {
    echo "$*"
    sync
    # Let the serial port drain: the reset throws away what is still in its queue.
    stty -F /dev/ttyS0 sane
    poweroff -f
}

fail() {
    echo "--- kernel log"
    dmesg | tail -n 40
    finish "FAIL: $*"
}

step() { echo "guest: $*"; }

# Ask the host to do something and wait until it has.
ask_host() {
    echo "$1" >&3
    read -r answer <&3
    [ "$answer" = "done" ] || fail "the host answered '$answer' to '$1'"
}

argument() { sed -n "s/.*nbd\.$1=\([^ ]*\).*/\1/p" /proc/cmdline; }

check_tree() { (cd "$1" && sha256sum -c /payload.sha256 >/dev/null) || fail "$1: content differs ($2)"; }

drop_caches() {
    sync
    echo 3 >/proc/sys/vm/drop_caches
}

prepare_machine() {
    mount -t devtmpfs none /dev
    mount -t proc none /proc
    mount -t sysfs none /sys
    for module in /modules/*.ko; do insmod "$module" || fail "insmod $module"; done
    stty -F /dev/ttyS1 raw -echo
    exec 3<>/dev/ttyS1
    ip link set lo up
    ip address add 10.0.2.15/24 dev eth0 && ip link set eth0 up || fail "no network"
}

attach() {
    step "attaching with $(argument connections) connection(s)"
    nbd-client 10.0.2.2 "$(argument port)" /dev/nbd0 -name disk -block-size 4096 \
        -connections "$(argument connections)" || fail "nbd-client"
    [ "$(blockdev --getsize64 /dev/nbd0)" -gt 0 ] || fail "the device has no size"
}

# Rewrite copies of the files until the host has folded, so that folding meets writes, overwrites and deletes.
keep_busy() {
    while [ ! -e /folded ]; do
        rm -rf /mnt/busy
        cp -r /payload /mnt/busy
        sync
    done
}

use_as_file_system() {
    step "making ext4"
    /sbin/mke2fs -q -t ext4 /dev/nbd0 || fail "mke2fs"
    mount -t ext4 /dev/nbd0 /mnt || fail "mount"
    step "copying files, twice"
    cp -r /payload /mnt/first && cp -r /payload /mnt/second || fail "cp"
    sync
    step "folding while busy"
    keep_busy &
    busy=$!
    until [ -d /mnt/busy ]; do :; done
    ask_host fold
    ask_host fold
    touch /folded
    wait "$busy"
    step "checking what was folded"
    drop_caches
    for tree in first second busy; do check_tree "/mnt/$tree" "after folding"; done
}

trim_and_remount() {
    step "deleting, trimming, folding, compacting"
    rm -rf /mnt/first /mnt/busy
    sync
    fstrim /mnt || fail "fstrim"
    ask_host fold
    ask_host compact
    step "overwriting what is folded, then mounting again"
    cp -r /payload /mnt/third || fail "cp"
    umount /mnt || fail "umount"
    mount -t ext4 /dev/nbd0 /mnt || fail "mount again"
    for tree in second third; do check_tree "/mnt/$tree" "after trim and remount"; done
    umount /mnt || fail "umount again"
}

# A tmpfs filled from a control group that may hold a fraction of it: the rest must go out to the swap device.
use_as_swap() {
    step "swapping, with discards"
    mkswap /dev/nbd0 >/dev/null && swapon -d /dev/nbd0 || fail "swapon"
    mount -t tmpfs none /ram
    mount -t cgroup2 none /cgroup
    echo +memory >/cgroup/cgroup.subtree_control || fail "no memory controller"
    mkdir /cgroup/small
    echo 8M >/cgroup/small/memory.max
    (
        echo 0 >/cgroup/small/cgroup.procs
        cp -r /payload /ram/first && cp -r /payload /ram/second
    ) || fail "cp under memory pressure"
    ask_host fold
    written=$(awk '$1 == "pswpout" { print $2 }' /proc/vmstat)
    [ "$written" -gt 1000 ] || fail "only $written pages were swapped out"
    for tree in first second; do check_tree "/ram/$tree" "out of swap"; done
    echo max >/cgroup/small/memory.max # what swapoff brings in is charged to the group again
    swapoff /dev/nbd0 || fail "swapoff"
    for tree in first second; do check_tree "/ram/$tree" "after swapoff"; done
    step "$written pages went to swap and came back"
}

detach() {
    nbd-client -d /dev/nbd0 || fail "nbd-client -d"
    nbd-client -c /dev/nbd0 && fail "still attached"
    errors=$(dmesg | grep -iE 'I/O error|EXT4-fs (error|warning)|timed out|corrupt|nbd0: (Other side|Receive|Send|Double|Unexpected)')
    [ -z "$errors" ] || fail "the kernel complains: $errors"
}

# --- nbdzram attach --persist: the host ends its server and starts another, again and again

keep_attached() {
    : >/keeper.log
    PYTHONHOME=$(cat /python/home) PYTHONPATH=$(cat /python/path) $(cat /python/program) -B -m nbdzram \
        attach disk /dev/nbd0 --uri "nbd://10.0.2.2:$(argument port)" --persist --request-timeout 3 "$@" >/keeper.log 2>&1 &
    keeper=$!
    until grep -q -e "attached disk" -e "looking after" /keeper.log; do
        kill -0 $keeper 2>/dev/null || fail "the keeper ended: $(cat /keeper.log)"
    done
}

# Write and read without pause, and count the rounds, until told to stop; only an error ends it early.
keep_writing() {
    round=0
    while [ ! -e /enough ]; do
        rm -rf /mnt/busy && cp -r /payload /mnt/busy && sync || break
        echo 3 >/proc/sys/vm/drop_caches
        (cd /mnt/busy && sha256sum -c /payload.sha256 >/dev/null) || break
        round=$((round + 1))
        echo $round >/rounds
    done
    [ -e /enough ] || touch /broken
}

another_round() {
    before=$(cat /rounds 2>/dev/null)
    until [ "$(cat /rounds 2>/dev/null)" != "$before" ]; do
        [ ! -e /broken ] || fail "an error reached the file system, after: $1; $(cat /keeper.log)"
        sleep 0.1
    done
}

outlive_servers() {
    step "making ext4"
    /sbin/mke2fs -q -t ext4 /dev/nbd0 || fail "mke2fs"
    mount -t ext4 /dev/nbd0 /mnt || fail "mount"
    keep_writing &
    writer=$!
    left=$(argument restarts)
    while [ "$left" -gt 0 ]; do
        for how in kill stop; do
            another_round start
            sleep $((RANDOM % 4)) # into the round that began, so that no two come at the same place of one
            step "the server: $how, $left of each to come"
            ask_host $how
        done
        left=$((left - 1))
    done
    another_round stop
    step "the keeper is killed, and then the server"
    kill -9 $keeper
    wait $keeper 2>/dev/null
    ask_host kill
    keep_attached
    grep -q "attached already" /keeper.log || fail "the keeper did not take over: $(cat /keeper.log)"
    another_round "the keeper was killed"
    step "told to leave a mounted disk, the keeper leaves it attached"
    kill -TERM $keeper
    wait $keeper || fail "the keeper ended with $?"
    grep -q "stays attached" /keeper.log || fail "$(cat /keeper.log)"
    another_round "the keeper left"
    keep_attached
    another_round "the keeper came back"
    touch /enough
    wait $writer
    check_tree /mnt/busy "after all restarts"
    umount /mnt || fail "umount"
    kill -TERM $keeper
    wait $keeper || fail "the keeper ended with $?: $(cat /keeper.log)"
    nbd-client -c /dev/nbd0 && fail "still attached"
}

take_over_from_nbd_client() {
    step "what nbd-client attached is kept, too, as Debian's initramfs calls it"
    nbd-client 10.0.2.2 -N disk "$(argument port)" /dev/nbd0 -swap -persist -systemd-mark -connections 2 -timeout 3 ||
        fail "nbd-client"
    keep_attached
    ask_host kill
    dd if=/payload.sha256 of=/dev/nbd0 bs=4096 conv=sync,fsync 2>/dev/null || fail "dd"
    nbd-client -d /dev/nbd0 || fail "nbd-client -d"
    wait $keeper || fail "the keeper ended with $?: $(cat /keeper.log)"
    grep -q "was detached" /keeper.log || fail "$(cat /keeper.log)"
}

# --- swap that the whole machine lives from, for as long as nbd.seconds says; the host folds and restarts its server

FOLD_SECONDS=60

# Memory is at work: pages were visited since the last look. One that hangs never passes here, which the host notices.
pages_go_on() {
    before=$(cat /progress 2>/dev/null)
    until [ "$(cat /progress 2>/dev/null)" != "$before" ]; do
        kill -0 $pressure 2>/dev/null || fail "after $1: $(cat /pressure.log) $(cat /keeper.log)"
        sleep 1
    done
}

swapped() { awk '$1 == "SwapTotal:" { total = $2 } $1 == "SwapFree:" { print int((total - $2) / 1024) }' /proc/meminfo; }

live_from_swap() {
    mkswap /dev/nbd0 >/dev/null && swapon -d /dev/nbd0 || fail "swapon"
    rm -rf /payload
    join=true
    free=$(argument group)
    if [ -n "$free" ]; then
        mount -t cgroup2 none /cgroup
        echo +memory >/cgroup/cgroup.subtree_control || fail "no memory controller"
        mkdir /cgroup/small
        echo "${free}M" >/cgroup/small/memory.max
        join="echo 0 >/cgroup/small/cgroup.procs"
    else
        free=$(awk '$1 == "MemAvailable:" { print int($2 / 1024) }' /proc/meminfo)
    fi
    size=$((free + $(argument swapped)))
    step "$size MiB of memory in use, where $free are free"
    sh -c "$join; exec \"\$@\"" pressure $(cat /python/program) -B /pressure.py $size /progress /enough >/pressure.log 2>&1 &
    pressure=$!
    echo 1000 >/proc/$pressure/oom_score_adj
    start=$(cut -d. -f1 /proc/uptime)
    seconds=$(argument seconds)
    least=99999
    todo="stop:$((seconds / 3)) kill:$((seconds * 2 / 3))"
    passed=0
    while [ $passed -lt "$seconds" ]; do
        sleep $FOLD_SECONDS
        pages_go_on "a while"
        ask_host fold
        passed=$(($(cut -d. -f1 /proc/uptime) - start))
        set -- $todo
        if [ $# -gt 0 ] && [ $passed -ge "${1#*:}" ]; then
            ask_host "${1%:*}"
            pages_go_on "${1%:*}"
            shift
            todo="$*"
        fi
        now=$(swapped)
        [ "$(cut -d' ' -f2 /progress)" -eq 0 ] || [ "$now" -ge $least ] || least=$now
        step "$passed s: $now MiB in swap, pages and passes $(cat /progress)"
    done
    [ -z "$todo" ] || fail "not restarted: $todo"
    touch /enough
    wait $pressure || fail "$(cat /pressure.log)"
    grep -E '^(pswpin|pswpout|oom_kill) ' /proc/vmstat
    step "at least $least MiB were in swap at each look"
    swapoff /dev/nbd0 || fail "swapoff"
    kill -TERM $keeper
    wait $keeper || fail "the keeper ended with $?: $(cat /keeper.log)"
}

no_error_in_the_log() {
    errors=$(dmesg | grep -iE 'I/O error|EXT4-fs (error|warning)|corrupt|Out of memory|read-error on swap|hung task')
    [ -z "$errors" ] || fail "the kernel complains: $errors"
}

# --- a root disk, which an initramfs of the distribution's has attached and mounted

boot_from_root() {
    stty -F /dev/ttyS1 raw -echo
    exec 3<>/dev/ttyS1
    step "booted from $(grep ' / ' /proc/mounts)"
    grep -q '^/dev/\(nbd0\|root\) / ext4 rw' /proc/mounts || fail "another root"
    timeout=$(cat /sys/block/nbd0/queue/io_timeout)
    [ "$timeout" = 10000 ] || fail "requests have $timeout ms"
    ask_host look
    keep_attached
    mkdir -p /work
    for how in kill stop; do
        step "the server: $how"
        ask_host $how
        dd if=/dev/urandom of=/work/$how bs=64k count=16 2>/dev/null && sync || fail "an error reached the disk"
        sha256sum /work/$how >>/run/sums
    done
    drop_caches
    sha256sum -c /run/sums >/dev/null || fail "content differs"
}

if [ "$(argument work 2>/dev/null)" = root ]; then # what the initramfs mounted is there
    boot_from_root
    no_error_in_the_log
    finish "PASS: a root disk whose server was killed and stopped, Linux $(uname -r)"
fi
prepare_machine
if [ "$(argument work)" = persist ]; then
    keep_attached
    outlive_servers
    take_over_from_nbd_client
    no_error_in_the_log
    finish "PASS: ext4 on a disk whose server was killed and stopped, Linux $(uname -r)"
fi
if [ "$(argument work)" = swap ]; then
    export PYTHONHOME=$(cat /python/home) PYTHONPATH=$(cat /python/path)
    echo 4096 >/proc/sys/vm/min_free_kbytes
    keep_attached --swap
    live_from_swap
    no_error_in_the_log
    finish "PASS: $(argument swapped) MiB beyond the memory for $(argument seconds) s, Linux $(uname -r)"
fi
attach
use_as_file_system
trim_and_remount
use_as_swap
detach
finish "PASS: ext4 and swap on nbd0, $(argument connections) connection(s), Linux $(uname -r)"
