"""One libvirtd of their own for all of these tests, with images labelled as by default."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from lxml import etree
from tests.kit import guest
from tests.kit.domain import DomainScene, domain_scene, record_schema
from tests.kit.domain_guest import Written
from tests.kit.libvirtd import Libvirtd, libvirtd_or_skip

from snaptree.store.libvirt.calls import DomainHandle


@pytest.fixture(scope="session")
def own() -> Iterator[Libvirtd]:
    """A libvirtd."""
    with libvirtd_or_skip() as found:
        yield found


@pytest.fixture(scope="session")
def initramfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guest's first file system."""
    guest.kernel()
    return guest.build(tmp_path_factory.mktemp("domain-guest"))


@pytest.fixture(autouse=True)
def sent(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the records that are written: each is as libvirt's schema has it, before libvirt has made its own
    of it."""
    real, names, wrong = DomainHandle.redefine, list[str](), list[str]()

    def redefine(self: DomainHandle, text: str, name: str, *, current: bool = False) -> None:
        names.append(name)
        schema = record_schema()
        if not schema.validate(etree.fromstring(text)):
            wrong.append(f"{name}: {schema.error_log}\n{text}")
        real(self, text, name, current=current)

    monkeypatch.setattr(DomainHandle, "redefine", redefine)
    yield names
    assert wrong == []


@pytest.fixture
def domain(own: Libvirtd) -> Iterator[DomainScene]:
    """An empty folder for images; no domain yet."""
    with domain_scene(own) as found:
        yield found


@pytest.fixture
def written(domain: DomainScene, initramfs: Path) -> Written:
    """A domain with a guest that has not been started yet."""
    return Written(domain, initramfs)


@pytest.fixture(params=["off", pytest.param("running", marks=pytest.mark.slow)])
def state(request: pytest.FixtureRequest) -> str:
    """What the domain does."""
    return str(request.param)


@pytest.fixture
def web(domain: DomainScene) -> DomainScene:
    """A domain with one qcow2 disk that shows ``b.......``."""
    domain.image("web.qcow2", word="b")
    domain.define("vda=web.qcow2")
    return domain
