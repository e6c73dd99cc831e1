"""One libvirtd of their own for all of these tests, with images labelled as by default."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.kit.domain import DomainScene, domain_scene
from tests.kit.libvirtd import Libvirtd, libvirtd_or_skip


@pytest.fixture(scope="session")
def own() -> Iterator[Libvirtd]:
    """A libvirtd."""
    with libvirtd_or_skip() as found:
        yield found


@pytest.fixture
def domain(own: Libvirtd) -> Iterator[DomainScene]:
    """An empty folder for images; no domain yet."""
    with domain_scene(own) as found:
        yield found


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
