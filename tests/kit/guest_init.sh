#!/bin/busybox sh
# The first program of the tests' guest: loads drivers, lets the writer work, and turns the machine off when it ends.
/bin/busybox mkdir -p /proc /sys /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
while read -r module; do /bin/busybox insmod "/modules/$module"; done < /modules/order
/bin/busybox stty -F /dev/console -echo -icanon
/writer < /dev/console > /dev/console
/bin/busybox poweroff -f
