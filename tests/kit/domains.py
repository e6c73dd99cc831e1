"""The scenarios of standalone machines on libvirt's domains: the same lines, said to domains of the same names.

What a domain doesn't have is said to virsh: ``add`` defines one, ``disk attach`` and ``disk detach`` are virsh's.
"""

from __future__ import annotations

import shlex
import uuid
from pathlib import Path

from tests.kit.domain import DomainScene, define_text
from tests.kit.libvirtd import Libvirtd
from tests.kit.scene import Said

DONE = Said(0, "", "")


class Domains(DomainScene):
    """A scene whose machines are domains.

    :param wanted: what they do, ``off`` or ``running``, whenever snaptree works on one.
    """

    def __init__(self, folder: Path, own: Libvirtd, wanted: str) -> None:
        super().__init__(folder, own)
        self.name = "web1"
        self.wanted = wanted
        self.defined: list[str] = []

    def __call__(self, line: str, *, status: int | None = 0) -> Said:
        words = shlex.split(line)
        if status == 0 and words[0] == "add":
            return self._add(words[1], words[2:])
        if status == 0 and words[:2] == ["disk", "attach"]:
            return self._attach(words[2], words[3])
        if status == 0 and words[:2] == ["disk", "detach"]:
            return self._detach(words[2], words[3], unlink="--delete-files" in words)
        said = super().__call__(line, status=status)
        if words[0] == "remove":
            self.defined.remove(words[1])
        return said

    def _add(self, machine: str, options: list[str]) -> Said:
        disks: list[tuple[str, Path, str]] = []
        rest = [each for each in options if each != "--adopt"]
        for option, value in zip(rest[::2], rest[1::2], strict=True):
            assert option == "--disk", f"a domain has no {option}"
            place, _, form = value.partition(",format=")
            target, _, path = place.rpartition("=")
            disks.append((target or "vda", self.disks / path, form or "qcow2"))
        self.define_xml(define_text(machine, str(uuid.uuid4()), disks))
        self.defined.append(machine)
        if rest != options:
            self(f"set {machine} --adopt")
        self._as_wanted(machine)
        return DONE

    def _attach(self, machine: str, disk: str) -> Said:
        target, _, place = disk.partition("=")
        place, _, form = place.partition(",format=")
        self._off(machine)
        words = ("attach-disk", machine, self.disks / place, target, "--driver", "qemu", "--subdriver", form or "qcow2")
        self.virsh(*words, "--config")
        self._as_wanted(machine)
        return DONE

    def _detach(self, machine: str, target: str, *, unlink: bool) -> Said:
        self._off(machine)
        path = self.source(target, machine)[0]
        self.virsh("detach-disk", machine, target, "--config")
        if unlink:
            path.unlink()
        self._as_wanted(machine)
        return DONE

    def _off(self, machine: str) -> None:
        if self.runs(machine):
            self.virsh("destroy", machine)

    def _as_wanted(self, machine: str) -> None:
        if self.wanted == "running":
            self.virsh("start", machine)

    def remove(self) -> None:
        for each in self.defined:
            self.name = each
            super().remove()
