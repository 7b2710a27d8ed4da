"""Every Python snippet of the README runs as it stands, and its tables are those of the committed benchmarks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ferrovae.bench.tables import update

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_is_a_snippet_for_each_use() -> None:
    assert len(SNIPPETS) == 5
    assert all(len(snippet.strip().splitlines()) <= 14 for snippet in SNIPPETS)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["operation", "layer", "swap", "model", "evidence"])
def test_snippet_runs(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {"__name__": "readme"})


def test_tables_are_those_of_the_committed_benchmarks() -> None:
    assert "<!-- table:" in README
    assert update(README, ROOT / "benchmarks") == README


def test_an_unknown_table_is_named() -> None:
    with pytest.raises(ValueError, match="'nothing' is unknown"):
        update("<!-- table: nothing -->\n<!-- end -->", ROOT)
