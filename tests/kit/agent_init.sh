#!/bin/busybox sh
# The first program of a guest with qemu-guest-agent: writes lines to a file system on its disk, and never syncs them.
# It says "W NUMBER" after each; what it hears on its console is a command for its shell.
for each in $(/bin/busybox --list); do [ -e "/bin/$each" ] || /bin/busybox ln -s busybox "/bin/$each"; done
export PATH=/bin
mkdir -p /proc /sys /dev /run /mnt
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r module; do insmod "/modules/$module"; done < /modules/order
stty -F /dev/console -echo
mount -t ext4 /dev/vda /mnt || echo "E mount" > /dev/console
# An hour until the kernel writes of its own accord.
echo 360000 > /proc/sys/vm/dirty_expire_centisecs
echo 360000 > /proc/sys/vm/dirty_writeback_centisecs
mount -o remount,commit=3600 /mnt
/usr/sbin/qemu-ga -m virtio-serial -p /dev/vport*p1 -t /run > /dev/console 2>&1 &
(
  number=0
  while true; do
    number=$((number + 1))
    echo "line $number" >> /mnt/log || echo "E write"
    echo "W $number"
    usleep 50000
  done
) > /dev/console &
while true; do
  while read -r line; do eval "$line"; done
  usleep 100000
done < /dev/console > /dev/console 2>&1
