#!/bin/busybox sh
# Process 1 of the guest: use an export as a disk, then as swap, and print one line, PASS or FAIL.
#
# The host listens on the second serial port: this script writes a word, the host acts (folds) and answers "done".
# Arguments come on the kernel's command line: nbd.port, nbd.connections.

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

prepare_machine
attach
use_as_file_system
trim_and_remount
use_as_swap
detach
finish "PASS: ext4 and swap on nbd0, $(argument connections) connection(s), Linux $(uname -r)"
