"""What is measured: the rows of the table, and the ways that are compared in each."""

from __future__ import annotations

from dataclasses import dataclass, replace

MIB = 1 << 20
SMALLEST = 16 * MIB
"""No delta is made smaller, whatever the divisor."""

SNAPTREE, BARE = "snaptree", "bare Python"
COMMIT_WAY, PULL_WAY = "snaptree --merge commit", "snaptree --merge pull"
COMMIT, REBASE, REBASE_NONE = "qemu-img commit", "qemu-img rebase", "qemu-img rebase -t none"
VIRSH, DD = "virsh", "dd"
OURS = (SNAPTREE, COMMIT_WAY, PULL_WAY)
THEIRS = (COMMIT, REBASE, REBASE_NONE, VIRSH, DD)


@dataclass(frozen=True)
class Row:
    """One row of the table.

    ``delta`` is how many bytes the layers that go hold, on each disk, in extents of ``extent`` bytes: scattered over
    the disk and over the files, or one after the other. ``merged`` layers become one. ``running`` has a guest write to
    the disk meanwhile. With ``domain`` snaptree works on a libvirt domain, the very one that virsh works on. With
    ``memory`` no layer goes, but a snapshot is taken with so many bytes of memory that the
    guest has filled.
    """

    what: str
    system: str
    delta: int
    extent: int = MIB
    scattered: bool = True
    merged: int = 2
    disks: int = 1
    every_way: bool = False
    running: bool = False
    domain: bool = False
    memory: int = 0

    @property
    def name(self) -> str:
        """The name that ``--only`` looks at and that figures are kept under."""
        return f"{self.system}: {self.what}"

    def divided(self, divisor: int) -> Row:
        """The row with so many times less data; one that is a number of extents keeps the number."""
        if divisor == 1:
            return self
        delta = max(SMALLEST, self.delta // divisor)
        extent = max(65536, delta * self.extent // self.delta) if self.what == SAME_EXTENTS else self.extent
        memory = max(SMALLEST, self.memory // divisor) if self.memory else 0
        return replace(self, delta=delta, extent=extent, memory=memory)

    def ways(self) -> tuple[str, ...]:
        """What is compared, in the order in which it is tried."""
        if self.running or self.domain:
            return (SNAPTREE, VIRSH) if self.memory else (BARE, SNAPTREE, VIRSH)
        return (BARE, DD, *(OURS if self.every_way else (SNAPTREE,)), COMMIT, VIRSH, REBASE, REBASE_NONE)


ONE, SMALL, FOUR, EIGHT = "1 GiB", "256 MiB", "4 GiB", "8 GiB"
SAME_EXTENTS = "8 GiB in 1024 extents"
FINE, CONTIGUOUS = "1 GiB in extents of 64 KiB", "1 GiB in one piece"
RUNNING, RUNNING_EIGHT = "1 GiB, running", "8 GiB, running"
LITTLE_MEMORY, MUCH_MEMORY = "snapshot with 256 MiB of memory", "snapshot with 2 GiB of memory"
DOMAIN_OFF, DOMAIN, DOMAIN_EIGHT = "domain off, 1 GiB", "domain running, 1 GiB", "domain running, 8 GiB"
TWO_DISKS, THIRTY = "two disks, 1 GiB each", "30 layers into one, 1 GiB"

ROWS = (
    *(Row(ONE, system, 1024 * MIB, every_way=True) for system in ("xfs", "btrfs", "ext4")),
    *(
        row
        for system in ("xfs", "ext4")
        for row in (
            Row(SMALL, system, 256 * MIB),
            Row(FOUR, system, 4096 * MIB),
            Row(EIGHT, system, 8192 * MIB),
            Row(SAME_EXTENTS, system, 8192 * MIB, extent=8 * MIB),
            Row(FINE, system, 1024 * MIB, extent=65536),
            Row(CONTIGUOUS, system, 1024 * MIB, scattered=False),
            Row(TWO_DISKS, system, 1024 * MIB, disks=2),
            Row(THIRTY, system, 1024 * MIB, merged=30),
        )
    ),
    Row(SAME_EXTENTS, "btrfs", 8192 * MIB, extent=8 * MIB),
    Row(RUNNING, "xfs", 1024 * MIB, running=True),
    Row(RUNNING_EIGHT, "xfs", 8192 * MIB, running=True),
    Row(RUNNING, "ext4", 1024 * MIB, running=True),
    *(Row(DOMAIN_OFF, system, 1024 * MIB, domain=True) for system in ("xfs", "ext4")),
    *(Row(DOMAIN, system, 1024 * MIB, running=True, domain=True) for system in ("xfs", "ext4")),
    Row(DOMAIN_EIGHT, "xfs", 8192 * MIB, running=True, domain=True),
    Row(LITTLE_MEMORY, "xfs", SMALLEST, running=True, memory=256 * MIB),
    Row(MUCH_MEMORY, "xfs", SMALLEST, running=True, memory=2048 * MIB),
)
