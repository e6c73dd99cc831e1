#!/bin/busybox sh
# The first program of the tests' guest: loads drivers, lets the writer work, and turns the machine off when it ends.
/bin/busybox mkdir -p /proc /sys /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
while read -r module; do /bin/busybox insmod "/modules/$module"; done < /modules/order
# With fill=N on the kernel's command line, N MiB of memory hold something before it begins.
for word in $(/bin/busybox cat /proc/cmdline); do
  case $word in
    fill=*)
      /bin/busybox mkdir /fill
      /bin/busybox mount -t tmpfs -o size=100% tmpfs /fill
      /bin/busybox dd if=/dev/urandom of=/fill/0 bs=1M count=8 2>/dev/null
      at=8
      while [ "$at" -lt "${word#fill=}" ]; do
        /bin/busybox cp /fill/0 "/fill/$at"
        at=$((at + 8))
      done
      ;;
  esac
done
/bin/busybox stty -F /dev/console -echo -icanon
/writer < /dev/console > /dev/console
# It has been told to begin again.
[ $? = 3 ] && /bin/busybox reboot -f
/bin/busybox poweroff -f
