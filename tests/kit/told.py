"""snaptree in a process of its own, in which something is killed around the n-th thing that it tells libvirt."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.kit.domain import URI, DomainScene

WITHIN_SECONDS = 0.4
"""So long after it has been told what to do libvirt is at it."""
_ROOT = Path(__file__).parents[2]
_PROGRAM = """
import os, signal, sys, threading
from pathlib import Path
from snaptree.cli.main import run
from snaptree.running.journal import Journal
from snaptree.store.libvirt.calls import DomainHandle
from snaptree.store.libvirt.memory import DomainMemory
from tests.kit.stage import kill_and_wait, processes_of

left = {when}

def kills(around):
    # What has ended has no program any more, though it may still be in the table.
    if {process} and not Path("/proc/{process}/exe").exists():
        return
    print("killed", around, file=sys.stderr, flush=True)
    if {folder!r}:
        kill_and_wait(Path({folder!r}))
    else:
        os.kill({process} or os.getpid(), signal.SIGKILL)

def killed(real, name):
    def call(*words, **more):
        global left
        left -= 1
        if left == 0 and {before}:
            kills("before " + name)
        answer = real(*words, **more)
        if left == 0 and not {before}:
            kills("after " + name)
        return answer
    return call

def within(real):
    def call(*words, **more):
        for each in processes_of(Path({stopped!r})) if {stopped!r} else ():
            os.kill(each, signal.SIGSTOP)
        threading.Timer({within_seconds}, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return real(*words, **more)
    return call

def noted(self, path, value, real=Journal.note):
    real(self, path, value)
    if value == {noted!r}:
        os.kill(os.getpid(), signal.SIGKILL)

if {noted!r}:
    Journal.note = noted
if {within!r}:
    setattr(DomainMemory, {within!r}, within(getattr(DomainMemory, {within!r})))
for of, names in ((DomainHandle, {calls}), (DomainMemory, {memory_calls})):
    for name in names:
        setattr(of, name, killed(getattr(of, name), name))
sys.exit(run(sys.argv[1:]))
"""


def run_killed(
    web: DomainScene,
    line: str,
    when: int,
    *,
    before: bool,
    calls: Sequence[str],
    memory_calls: Sequence[str] = (),
    victim: int | Path = 0,
    seconds: float | None = None,
    within: str = "",
    stops: bool = False,
    noted: str = "",
) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run a command; how it ended, and around what something was killed, empty when it did not come so far.

    :param calls: the methods of ``DomainHandle`` that count, with ``memory_calls`` of ``DomainMemory``.
    :param within: a method of ``DomainMemory`` in the middle of which snaptree is killed.
    :param stops: QEMU is stopped by then, so that libvirt cannot bring it to an end.
    :param noted: what the journal notes just before snaptree is killed.
    :param victim: a process, 0 for snaptree's own; or the folder whose QEMU it is.
    """
    folder, process = (str(victim), 0) if isinstance(victim, Path) else ("", victim)
    program = _PROGRAM.format(
        when=when,
        before=before,
        folder=folder,
        process=process,
        calls=tuple(calls),
        memory_calls=tuple(memory_calls),
        within=within,
        noted=noted,
        stopped=str(web.folder) if stops else "",
        within_seconds=WITHIN_SECONDS,
    )
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", program, *shlex.split(line.replace("@", web.name))],
        env={**os.environ, URI: web.own.uri, "SNAPTREE_STATE": str(web.state), "PYTHONPATH": path},
        cwd=web.disks,
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
    )
    told = [each for each in done.stderr.splitlines() if each.startswith("killed ")]
    return done, told[0] if told else ""
