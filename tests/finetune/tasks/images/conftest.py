"""Few drawn images, in a cache for these tests alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from evatune.finetune.tasks.images import base


@pytest.fixture(scope="package", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVATUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(base, "_DRAWN_COUNT", 200)
        yield
