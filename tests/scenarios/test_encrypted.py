"""Encrypted (LUKS) disks: every overlay and every merge of theirs is encrypted, whatever is done, and needs their key
only where data is read or moved."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import pytest
from tests.kit import images, luks
from tests.kit.images import KiB
from tests.kit.programs import killed
from tests.kit.rights import picture
from tests.kit.scene import SLOT, Scene

from snaptree.images import gate, qemu_img
from snaptree.images.facts import read_facts
from snaptree.running.carry import by_qemu


@pytest.fixture
def key(scene: Scene) -> Path:
    return luks.key_file(scene.folder)


@pytest.fixture
def locked(scene: Scene, key: Path) -> Scene:
    """An encrypted disk of which nobody has given the key."""
    scene.image("web1.qcow2", word="b", **luks.OPTIONS)
    scene("add web1 --disk vda=web1.qcow2")
    return scene


@pytest.fixture
def web1(locked: Scene, key: Path) -> Scene:
    """A machine with an encrypted disk."""
    locked(f"set web1 --key {key}")
    return locked


def encrypted(scene: Scene) -> set[bool]:
    """Whether the machine's layers are encrypted."""
    return {read_facts(each["path"], each["format"]).encrypted for each in scene.show()["layers"]}


def whole(scene: Scene, **words: str) -> None:
    """Each name shows what it should, all is encrypted, and nothing is over or wrong."""
    assert {name: scene.shows(name) for name in scene.names()} == words
    assert encrypted(scene) == {True}
    assert luks.in_the_clear(scene.folder) == set()
    scene.sound()


def test_overlays_need_no_key(locked: Scene) -> None:
    """Snapshots, branches, going back and switching make overlays, which open with what opens the layers beneath."""
    locked("snapshot web1 s1")
    locked.write(".c")
    locked("snapshot web1 s2")
    locked.write("..d")
    locked("branch web1 b1 --from s1")
    locked("branch web1 b2")
    locked("revert web1 s1")
    locked.write("...e")
    locked("switch web1 b1")
    locked.write("....f")

    words = {
        "s1": "b.......",
        "s2": "bc......",
        "b2": "bcd.....",
        "main": "b..e....",
        "b1": "b...f...",
    }
    assert {name: locked.shows(name) for name in locked.names()} == words
    assert encrypted(locked) == {True} and luks.in_the_clear(locked.folder) == set()
    assert {each["kind"] for each in locked.findings()} == {"encrypted"}


def test_what_needs_the_key_is_refused_without_it(locked: Scene, key: Path) -> None:
    """Before anything is touched; what is merely put off is told so, and is done when the key has been given."""
    locked(f"set web1 --key {key} --start qemu-system-x86_64")
    locked("snapshot web1 i1 --internal")
    locked.write(".c")
    locked("snapshot web1 s1")
    locked.write("..d")
    locked("snapshot web1 s2")
    locked('set web1 --key ""')
    before = picture(locked.disks)
    for line in (
        "snapshot web1 s3 --internal",
        "branch web1 b1 --from i1",
        "revert web1 i1 --discard",
        "delete web1 i1",
        "start web1",
    ):
        said = locked(line, status=6)
        assert "is encrypted, and its key is not known" in said.err and "--key FILE" in said.err, said
        assert picture(locked.disks) == before, line

    said = locked("delete web1 s1")

    assert "is encrypted, and its key is not known" in said.out, said
    assert picture(locked.disks) == before
    locked(f"set web1 --key {key}")
    locked("gc web1")
    whole(locked, i1="b.......", s2="bcd.....", main="bcd.....")


@pytest.mark.parametrize("way", ["auto", "commit", "pull"])
def test_layers_are_merged(web1: Scene, way: str) -> None:
    for number, word in enumerate((".c", "..d", "...e", "....f"), 1):
        web1(f"snapshot web1 s{number}")
        web1.write(word)
    web1("branch web1 b1 --from s2")

    web1(f"delete web1 s3 --merge {way}")

    whole(web1, s1="b.......", s2="bc......", s4="bcde....", main="bcdef...", b1="bc......")
    web1(f"delete web1 s1 s2 --merge {way}")
    whole(web1, s4="bcde....", main="bcdef...", b1="bc......")
    web1(f"delete web1 --branch b1 --merge {way}")
    web1(f"delete web1 s4 --merge {way}")
    web1("gc web1")
    whole(web1, main="bcdef...")
    assert len(web1.chain()) == 1


def test_how_long_it_takes_is_foreseen(web1: Scene) -> None:
    """Most of it is trying the passphrase: once beforehand, and for each layer."""
    web1("snapshot web1 s1")
    web1("snapshot web1 s2")
    web1.write(".c")
    plan = web1("delete web1 s1 s2 --plan --json").json
    assert 2 * (1 + 2) < sum(each["seconds"] for each in (plan, *plan.get("then", ()))) < 2 * (1 + 3)


def test_internal_snapshots(web1: Scene) -> None:
    """They are taken, gone back to, made external and deleted."""
    web1("snapshot web1 i1 --internal")
    web1.write(".c")
    web1("snapshot web1 i2 --internal")
    web1.write("..d")
    web1("branch web1 b1 --from i1")
    whole(web1, i1="b.......", i2="bc......", main="bcd.....", b1="b.......")

    web1("revert web1 i2 --discard")
    web1.write("...e")
    web1("delete web1 i1")

    whole(web1, i2="bc......", main="bc.e....", b1="b.......")
    web1("snapshot web1 s1")
    web1("delete web1 i2 s1 --merge commit")
    whole(web1, main="bc.e....", b1="b.......")


def test_a_layer_of_another_size_is_merged(web1: Scene) -> None:
    """What a shorter layer hides is written as zeroes, by QEMU, which needs the key for that too."""
    web1("snapshot web1 s1")
    tip = web1.path("main")
    said = images.run("qemu-img", "resize", "--shrink", *luks.opened(tip, "qcow2"), str(4 * SLOT))
    assert "resized" in said
    web1.write(".c")
    web1("snapshot web1 s2")
    images.run("qemu-img", "resize", *luks.opened(web1.path("main"), "qcow2"), str(8 * SLOT))
    web1.write("......d")

    web1("delete web1 s1 s2 --merge commit")

    whole(web1, main="bc....d.")


def test_what_was_cut_off_does_not_come_back(scene: Scene, key: Path) -> None:
    """Where a merged layer is made shorter, and grows again, it shows zeroes there: the guest's, not the file's."""
    scene.image("web1.qcow2", word="bbbbbbbb", **luks.OPTIONS)
    scene(f"add web1 --disk vda=web1.qcow2 --key {key}")
    scene("snapshot web1 s1")
    end = 3 * SLOT + SLOT // 2
    images.run("qemu-img", "resize", "--shrink", *luks.opened(scene.path("main"), "qcow2"), str(end))

    scene("delete web1 s1 --merge commit")

    assert len(scene.chain()) == 1
    images.run("qemu-img", "resize", *luks.opened(scene.path("main"), "qcow2"), str(8 * SLOT))
    assert images.read(scene.path("main")) == b"b" * end + bytes(8 * SLOT - end)
    scene.sound()


@pytest.mark.parametrize(
    "options",
    [
        {"cluster_size": 4 * KiB},
        {"extended_l2": "on"},
        pytest.param({"cluster_size": 2048 * KiB}, marks=pytest.mark.slow),
    ],
)
def test_an_overlay_has_the_options_of_its_layer(scene: Scene, key: Path, options: dict[str, Any]) -> None:
    """And one that QEMU opens, wherever in the file the LUKS header comes to lie."""
    scene.image("web1.qcow2", word="b", **luks.OPTIONS, **options)
    scene(f"add web1 --disk vda=web1.qcow2 --key {key}")
    scene("snapshot web1 s1")
    scene.write(".c")

    facts = [read_facts(str(scene.path(name)), "qcow2") for name in ("s1", "main")]

    assert facts[0].cluster_size == facts[1].cluster_size and facts[0].extended_l2 == facts[1].extended_l2
    assert facts[0].luks == facts[1].luks != ""
    # Of some 2 MiB only what opens it is written.
    assert facts[1].allocated < facts[0].allocated
    whole(scene, s1="b.......", main="bc......")
    scene("delete web1 s1")
    whole(scene, main="bc......")


@pytest.mark.parametrize("way", ["auto", "commit", "pull"])
def test_nothing_goes_down_into_a_plain_layer(scene: Scene, key: Path, way: str) -> None:
    """A user has put an encrypted overlay on a plain base: up into it data may go, down it may not."""
    base = scene.image("base.qcow2", word="b").read_bytes()
    scene.image("web1.qcow2", word=".c", backing="base.qcow2", **luks.OPTIONS)
    scene(f"add web1 --disk vda=web1.qcow2 --adopt --key {key}")
    scene("snapshot web1 s1")
    scene.write("..d")

    scene(f"delete web1 s1 --merge {way}")
    said = scene(f"squash web1 --disk vda --merge {way}", status=None)

    assert scene.shows() == "bcd....."
    assert read_facts(str(scene.path("main")), "qcow2").encrypted
    if way == "commit":
        assert "where its data would come to lie" in said.out + said.err, said
        assert (scene.disks / "base.qcow2").read_bytes() == base
    else:
        assert luks.in_the_clear(scene.folder) == set()
    assert len(scene.chain()) == (3 if way == "commit" else 1)
    scene.sound()


def test_zeroes_are_not_put_into_a_plain_layer(scene: Scene, key: Path) -> None:
    """To write a part of a cluster QEMU puts it together with what is beneath, which is encrypted."""
    scene.image("base.qcow2", word="bbbbbbbb", **luks.OPTIONS)
    for name, below, size in (("short", "base", 4 * SLOT + SLOT // 2), ("web1", "short", 8 * SLOT)):
        words = ("-b", f"{below}.qcow2", "-F", "qcow2", scene.disks / f"{name}.qcow2", str(size))
        images.run("qemu-img", "create", "-q", "-f", "qcow2", *words)
    scene(f"add web1 --disk vda=web1.qcow2 --adopt --key {key}")
    before = picture(scene.disks)

    said = scene("squash web1 --disk vda --merge commit", status=None)

    assert "where its data would come to lie" in said.out + said.err, said
    assert picture(scene.disks) == before


def test_a_plain_overlay_that_somebody_has_made_gets_an_encrypted_one(scene: Scene, key: Path) -> None:
    """What is copied on write may come from the encrypted layer beneath."""
    scene.image("base.qcow2", word="b", **luks.OPTIONS)
    scene.image("web1.qcow2", backing="base.qcow2")
    scene(f"add web1 --disk vda=web1.qcow2 --adopt --key {key}")
    scene.write("..c")
    scene("snapshot web1 s1")
    images.io(scene.path("main"), "qcow2", f"write -P 99 {SLOT // 2} 512")

    assert read_facts(str(scene.path("main")), "qcow2").encrypted
    assert luks.in_the_clear(scene.folder) == {"web1.qcow2"}
    before = scene.shows()
    said = scene("delete web1 s1 --merge pull")
    assert scene.shows() == before and luks.in_the_clear(scene.folder) == set(), said
    assert len(scene.chain()) == 1
    scene.sound()


def test_a_branch_from_within_a_plain_layer_on_an_encrypted_one(scene: Scene, key: Path) -> None:
    """What a guest writes there in parts is put together with what is beneath."""
    scene.image("base.qcow2", word="b", **luks.OPTIONS)
    web = scene.image("web1.qcow2", backing="base.qcow2")
    images.run("qemu-img", "snapshot", *luks.KEY, "-c", "i1", luks.opened(web, "qcow2")[-1])
    scene(f"add web1 --disk vda=web1.qcow2 --adopt --key {key}")

    scene("branch web1 b1 --from i1")
    images.io(scene.path("b1"), "qcow2", f"write -P 0 {SLOT // 2} 512")

    assert read_facts(str(scene.path("b1")), "qcow2").encrypted
    assert luks.in_the_clear(scene.folder) == set()
    assert scene.shows("i1") == "b......." and scene.shows("b1") == "?......."
    scene.sound()


@pytest.mark.parametrize("line", ["snapshot web1 s1", "branch web1 b1", "branch web1 b1 --from i1"])
def test_nobody_else_gets_at_its_header(scene: Scene, key: Path, line: str) -> None:
    """Who can read that can try passphrases: no file has it that is more readable than the encrypted layer."""
    base = scene.image("base.qcow2", word="b", **luks.OPTIONS)
    web = scene.image("web1.qcow2", backing="base.qcow2", word=".c")
    base.chmod(0o600)
    web.chmod(0o644)
    images.run("qemu-img", "snapshot", *luks.KEY, "-c", "i1", luks.opened(web, "qcow2")[-1])
    scene(f"add web1 --disk vda=web1.qcow2 --adopt --key {key}")
    before = picture(scene.disks)

    said = scene(line, status=6)

    assert "whose LUKS header it would have" in said.err, said
    assert picture(scene.disks) == before
    web.chmod(0o600)
    scene(line)
    assert {path.stat().st_mode & 0o777 for path in scene.disks.iterdir()} == {0o600}


def test_layers_with_keys_of_their_own(scene: Scene, key: Path) -> None:
    """Each is opened with the key that opens it, and what is put on it opens with that."""
    other = scene.folder / "other" / "key"
    other.parent.mkdir()
    other.write_text("shibboleth")
    words = ["--object", f"secret,id=old,file={key}", "--object", f"secret,id=new,file={other}"]
    scene.image("base.qcow2", word="b", **luks.OPTIONS)
    options = "encrypt.format=luks,encrypt.key-secret=new,encrypt.iter-time=10"
    path = scene.disks / "web1.qcow2"
    images.run(
        "qemu-img", "create", "-q", "-f", "qcow2", *words, "-o", options, "-b", "base.qcow2", "-F", "qcow2", path
    )  # fmt: skip
    said = scene(f"add web1 --disk vda=web1.qcow2 --adopt --key {key}")
    assert "vda is encrypted" in said.out, said
    scene("snapshot web1 s1")
    assert scene("delete web1 s1").out.count("its key is not known") == 1

    scene(f"set web1 --key {other}")
    scene("gc web1")

    assert len(scene.chain()) == 1 and encrypted(scene) == {True}
    assert scene.shows() == "b......."
    scene.sound()


def test_keys_that_are_none(web1: Scene, key: Path) -> None:
    """Each is told, and what was known stays."""
    wrong = web1.folder / "wrong"
    wrong.write_text("sesam")
    ended = web1.folder / "ended"
    ended.write_text(f"{luks.PASSPHRASE}\n")
    assert "opens none of the machine's encrypted layers" in web1(f"set web1 --key {wrong}", status=6).err
    assert "a line's end" in web1(f"set web1 --key {ended}", status=6).err
    assert "there is no key file" in web1("set web1 --key nowhere", status=3).err
    assert "there is no key file" in web1("set web1 --key .", status=3).err
    web1.image("plain.qcow2")
    assert (
        "none of the machine's layers is encrypted"
        in web1(f"add web2 --disk vda=plain.qcow2 --key {key}", status=6).err
    )
    assert "an empty key forgets all" in web1(f'set web1 --key "" --key {key}', status=2).err
    assert "not handled" in web1("add web2 --disk vda=web1.qcow2,format=luks", status=2).err
    assert "others may read the key" in web1(f"set web1 --key {key}").err
    key.chmod(0o600)
    assert "others may read" not in web1(f"set web1 --key {key}").err
    web1("snapshot web1 s1")
    web1("snapshot web1 s2 --internal")
    for each in (ended, web1.disks / "plain.qcow2"):
        os.unlink(each)
    whole(web1, s1="b.......", s2="b.......", main="b.......")


def test_a_key_that_changes_or_goes(web1: Scene, key: Path) -> None:
    """Its file is looked for each time; whether it opens the layers is seen before the first step is taken."""
    for number in (1, 2):
        web1(f"snapshot web1 s{number}")
        web1.write("." * number + "c")
    key.unlink()
    assert "its key is not known" in web1("snapshot web1 i1 --internal", status=6).err
    assert "its key is not known" in web1("delete web1 s2").out
    before = picture(web1.disks)

    key.write_text("sesam")
    for line in ("gc web1", "delete web1 s1", "snapshot web1 i1 --internal"):
        said = web1(line, status=6)
        assert "does not open it" in said.err and "web1" in said.err, said
        assert picture(web1.disks) == before and web1.names().keys() == {"s1", "main"}
    wrong = [each for each in web1.findings() if each["kind"] == "encrypted"]
    assert wrong and {each["severity"] for each in wrong} == {"warning"}
    web1("snapshot web1 s3")
    web1("delete web1 s3 --merge none")

    luks.key_file(web1.folder)
    web1("gc web1")
    whole(web1, s1="b.......", main="bcc.....")


@pytest.mark.parametrize("moment", ["makes", "merges"])
def test_killed_and_then_the_key_is_somewhere_else(web1: Scene, key: Path, moment: str) -> None:
    """Recovery needs it; a key is remembered before anything that was killed is finished or undone."""
    web1("snapshot web1 s1")
    web1.write(".c")
    line = {"makes": "snapshot web1 i1 --internal", "merges": "delete web1 s1 --merge pull"}[moment]
    program = {"makes": qemu_img, "merges": by_qemu}[moment]
    killed(
        lambda: web1(line),
        lambda kill: setattr(
            program, {"makes": "snapshot_create", "merges": "run_jobs"}[moment], lambda *_, **__: kill()
        ),
    )
    web1.forgiven.add("leaks")
    other = web1.folder / "elsewhere" / "key"
    other.parent.mkdir()
    key.rename(other)
    said = web1("recover web1", status=None)
    assert said.status and "key" in said.err, said

    web1(f"set web1 --key {other}")

    web1("gc web1")
    kept = {"main": "bc......"} | ({"s1": "b......."} if moment == "makes" else {})
    whole(web1, **kept)


def test_a_passphrase_that_is_changed(web1: Scene, key: Path) -> None:
    """A layer that opens with another key than before is one whose key is not known, until that is given."""
    web1("snapshot web1 s1")
    new = web1.folder / "new" / "key"
    new.parent.mkdir()
    new.write_text("shibboleth")
    amend = "encrypt.state=active,encrypt.new-secret=new,encrypt.keyslot=1,encrypt.iter-time=10"
    graph = luks.opened(web1.path("main"), "qcow2")
    images.run("qemu-img", "amend", "--object", f"secret,id=new,file={new}", *graph[:2], "-o", amend, graph[2])
    assert gate.luks_id_at(str(web1.path("main"))) != gate.luks_id_at(str(web1.path("s1")))
    assert "its key is not known" in web1("delete web1 s1").out

    web1(f"set web1 --key {new}")
    web1("gc web1")

    whole(web1, main="b.......")


def test_files_with_strange_names(scene: Scene) -> None:
    """Of the key and of the disk: QEMU splits its options at commas."""
    folder = scene.disks / "a,b=c d"
    folder.mkdir()
    key = luks.key_file(folder)
    key = key.rename(folder / "the,,key,id=x")
    scene.image("a,b=c d/web,1.qcow2", word="b", **luks.OPTIONS)
    scene.left |= {key}
    scene(f"add web1 --disk vda={shlex.quote(str(folder / 'web,1.qcow2'))} --key {shlex.quote(str(key))}")
    scene("snapshot web1 s1")
    scene.write(".c")
    scene("snapshot web1 s2 --internal")

    scene("delete web1 s1 s2 --merge commit")

    assert scene.shows() == "bc......" and scene("verify web1").status == 0
