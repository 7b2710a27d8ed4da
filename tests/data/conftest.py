"""Several loader threads, however few processors the tests run on."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _many_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ferrovae.data.loader.useful_threads", lambda: 64)
