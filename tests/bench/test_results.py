"""Results as JSON, as a table in the terminal, in the README, and as a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.toy import row
from ferrovae.bench import plot, results, show, tables

RUN = {"torch": "2.9", "versions": {"faiss-cpu": "1.12.0"}, "load_average": [0.5, 1.25], "omp_wait_policy": "PASSIVE"}


def found(*rows: results.Row, run: str = "first") -> dict[str, Any]:
    return {"runs": {run: RUN}, "rows": [row | {"run": run} for row in rows]}


def test_a_rerun_replaces_its_rows_and_only_those(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    results.write(path, found(row("ferrovae", 1), row("eager", 2), row("eager", 3, dtype="bfloat16")))
    results.write(path, found(row("ferrovae", 1), row("eager", 5, version="2.0"), run="second"))
    read = results.read(path)
    assert [(line["dtype"], line["times_ours"], line["run"]) for line in read["rows"]] == [
        ("float32", 1, "second"),
        ("float32", 5, "second"),
        ("bfloat16", 3, "first"),
    ]
    results.write(path, found(row("eager", 7, dtype="bfloat16"), run="third"))
    assert set(results.read(path)["runs"]) == {"second", "third"}
    assert [file.name for file in tmp_path.iterdir()] == ["some.json"]


@pytest.mark.parametrize("field", [name for name in results.KEY if name != "provider"])
def test_every_part_of_the_key_tells_rows_apart(field: str) -> None:
    other = row("ferrovae", 1, **{field: {"N": 9} if field == "shape" else "other"})
    assert results.key(other) != results.key(row("ferrovae", 1))
    assert len(results.cases([other, row("ferrovae", 1)])) == 2


def test_a_folder_gets_a_file_an_operation(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"kernels": []}')
    written = results.write(tmp_path, found(row("ferrovae", 1), row("ferrovae", 1, operation="game")))
    assert [path.name for path in written] == ["toy.json", "game.json"]
    assert {line["operation"] for line in results.folder(tmp_path)["rows"]} == {"toy", "game"}


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text in ("{", "[]", '{"rows": []}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"x\.json is not"):
            results.write(path, found(row("ferrovae", 1)))
        assert path.read_text() == text


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    ours = row("ferrovae", 1, memory_limit=2**20, roof_target=None, met=False)
    wrong = row("faiss [flat]", 0.5, correct=False, target=0.4, met=True)
    show.print_results([ours, wrong], ["toy: boom"], ["toy: bad"])
    shown = capsys.readouterr().out
    for text in ("N=8 K=4", "faiss [flat]", "WRONG", "3.0 MiB", "50 %", "1 of 2 promises kept", "MISSED", "1 s .. 3 s"):
        assert text in shown
    assert "left out: toy: boom" in shown
    assert "FAILED: toy: bad" in shown


def test_units() -> None:
    assert [show.seconds(value) for value in (2.0, 0.0123, 4.5e-5, 3e-9)] == ["2 s", "12.3 ms", "45 us", "3 ns"]
    assert [show.size(value) for value in (None, 0, 2048, 3 * 2**30)] == ["-", "0 B", "2.0 KiB", "3.0 GiB"]
    spread = row("ferrovae", 1, mode="full", variant="one code", dtype="bfloat16", threads=1)
    assert show.shape(spread) == "N=8 K=4 full, one code, bfloat16, 1 thread"


def test_readme_table(tmp_path: Path) -> None:
    rows = [row("ferrovae", 1), row("faiss", 1.5), row("eager", 20.25)]
    rows += [row("ferrovae", 1, variant="one code"), row("eager", 0.5, variant="one code", correct=False)]
    results.write(tmp_path / "toy.json", found(*rows))
    document = tables.update("before\n<!-- table: toy -->\nold\n<!-- end -->\nafter", tmp_path)
    assert document.startswith(
        "before\n<!-- table: toy -->\n"
        "| toy | faiss | eager | extra memory | of roof |\n| --- | --- | --- | --- | --- |\n"
        "| N=8 K=4 | 1.50x | 20.2x | 3.0 MiB | 50 % |\n"
        "| N=8 K=4 one code |  | 0.50x (wrong) | 3.0 MiB | 50 % |\n"
    )
    assert (
        "a processor (avx2), torch 2.9, faiss-cpu 1.12.0, OpenMP passive, load average 1.2.\n<!-- end -->\nafter"
        in document
    )
    assert tables.update(document, tmp_path) == document


def test_readme_summary_has_a_line_a_peer(tmp_path: Path) -> None:
    rows = [row("ferrovae", 1), row("eager", 2), row("ferrovae", 1, dtype="bfloat16")]
    results.write(tmp_path / "toy.json", found(*rows, row("eager", 4, dtype="bfloat16"), row("bad", 9, correct=False)))
    lines = tables.render("speed", tmp_path).splitlines()
    assert lines[2:4] == ["| toy | eager | 2.00x to 4.00x | 2 |", ""]


def test_readme_promises(tmp_path: Path) -> None:
    ours = row("ferrovae", 1, memory_limit=2**20, roof_target=0.4, met=False)
    results.write(tmp_path / "toy.json", found(ours, row("eager", 2), row("faiss", 1.5, target=1.25, met=True)))
    assert tables.render("promises", tmp_path).splitlines()[2:5] == [
        "| toy | N=8 K=4 | 3.0 MiB, promised 1.0 MiB at most, 50 % of the roof, promised 40 % | no |",
        "| toy | N=8 K=4 | 1.50 x faiss, promised 1.25 x | yes |",
        "",
    ]


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [row("ferrovae", 1), row("faiss", 0.8), row("eager", 20.25, correct=False)]
    results.write(tmp_path, found(*rows, row("ferrovae", 1, simd="avx512"), row("faiss", 3, simd="avx512")))
    (path,) = plot.draw(tmp_path)
    first = path.read_text(encoding="utf-8")
    assert path.name == "toy.svg"
    places = ("toy on a processor (avx2)", "toy on a processor (avx512)")
    for text in (*places, "N=8 K=4", "20.2 (wrong result)", "1.12.0"):
        assert text in first
    plot.draw(tmp_path)
    assert path.read_text(encoding="utf-8") == first
    (picture,) = plot.draw(tmp_path, suffix=".png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no results of chess"):
        plot.draw(tmp_path, ["chess"])
    with pytest.raises(ValueError, match="no results in"):
        plot.draw(tmp_path / "nowhere")


def test_the_committed_results_are_readable() -> None:
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    committed = [path for path in folder.glob("*.json") if results.is_results(json.loads(path.read_text("utf-8")))]
    assert committed
    for path in committed:
        read = results.read(path)
        keys = [results.key(line) for line in read["rows"]]
        assert len(set(keys)) == len(keys)
        assert {line["run"] for line in read["rows"]} == set(read["runs"])
        assert {line["operation"] for line in read["rows"]} == {path.stem}
