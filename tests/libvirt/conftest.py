"""One libvirtd of their own for all of these tests, with images labelled as by default."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.kit import guest
from tests.kit.domain import DomainScene, domain_scene
from tests.kit.domain_guest import Written
from tests.kit.libvirtd import Libvirtd, libvirtd_or_skip


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
