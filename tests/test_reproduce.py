"""The experiments: what is run, and that tables are made of the logs alone."""
import importlib
import json
import re
import shutil
from pathlib import Path

import pytest

import reproduce


def leave_run(results, what, name, seed, wer):
    folder = reproduce.folder_of(results, what, name, seed)
    folder.mkdir(parents=True)
    before, after = dict(wer=0.2, similarity=0.8, length_ratio=1.0, f0_spread=2.5, truncated=0.0), dict(
        wer=wer, similarity=0.9, length_ratio=1.0, f0_spread=2.0, truncated=0.0)
    (folder / "summary.json").write_text(json.dumps({"seconds": 1, "test": {"before": before, "after": before}}))
    lines = [{"arguments": {"seed": seed}}, {"step": -1, "eval": before, "eval_wer": 0.2},
             {"step": 0, "reward": 0.5}, {"step": 0, "eval": after, "eval_wer": wer}]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_table_is_the_mean_and_range_after_the_last_step(tmp_path):
    for seed, wer in ((1, 0.10), (2, 0.14), (3, 0.12)):
        leave_run(tmp_path, "table2", "GRPO, R1", seed, wer)
    leave_run(tmp_path, "table2", "DiffRO", 1, 0.05)
    written = reproduce.write_all(tmp_path)
    assert (tmp_path / "table2.md").read_text().splitlines()[2:] == [
        "| no RL |  | 20.0 | 0.800 | 1.000 | 2.50 | 0.0 |",
        "| GRPO, R1 | 3 | 12.0 (10.0 to 14.0) | 0.900 | 1.000 | 2.00 | 0.0 |",
        "| DiffRO | 1 | 5.0 | 0.900 | 1.000 | 2.00 | 0.0 |"]
    assert [p.name for p in written] == ["table2.md", "table2.png"] and all(p.exists() for p in written)


def test_the_tables_of_the_pages_are_those_of_the_logs():
    pages = "".join(Path(page).read_text() for page in ("README.md", "docs/results.md"))
    tables = re.findall(r"<!-- (results/\S+\.md) -->\n(.*?)<!-- end -->", pages, re.DOTALL)
    assert {name for name, _ in tables} == {str(p) for p in Path("results").rglob("*.md")}
    made = {"table1.md": lambda r: reproduce.markdown(reproduce.asr_rows(r)),
            "table2.md": lambda r: reproduce.markdown(reproduce.tts_rows(r)),
            "table3.md": lambda r: reproduce.markdown(reproduce.tts_rows(r, "table3")),
            "figure2.md": lambda r: reproduce.phase_table(reproduce.phase_rows(r))}
    for name, text in tables:
        path = Path(name)
        assert text == path.read_text() == made[path.name](path.parent), name


@pytest.mark.parametrize("what", ["table1", "table2", "table3", "figure3"])
def test_the_logs_are_of_the_rows_that_they_stand_for(what):
    """What the header of every log in results/ was given is what the flags of its row give today."""
    checked = 0
    for name, (script, flags) in reproduce.ROWS[what].items():
        expected = vars(importlib.import_module(script.removesuffix(".py")).parse_args(flags.split()))
        for folder in Path("results", what).glob(reproduce.folder_of("", what, name, "*").name):
            given = json.loads((folder / "log.jsonl").read_text().splitlines()[0])["arguments"]
            different = {k for k in expected if json.dumps(expected[k]) != json.dumps(given[k])}
            assert different <= {"seed", "out", "device"}, (folder, different)
            checked += 1
    assert checked >= 4


def test_figure_2_has_a_row_for_what_ran_where_and_the_last_measurement_counts(tmp_path):
    line = {"script": "grpo_asr", "size": "real", "gib": 8.0, "flags": "--max-tokens 48 --micro 8", "peak_gib": 4.5,
            "device": "NVIDIA H100 80GB HBM3"}
    lines = [{**line, "seconds": {"encode": 9.0, "update": 9.0}}, {**line, "seconds": {"encode": 0.25, "update": 1.0}},
             {"script": "grpo_tts", "size": "embedded", "gib": None, "flags": "", "device": "cpu, 2 threads",
              "peak_gib": 2.0, "seconds": {"decode": 0.5, "update": 1.5}}, {**line, "gib": 4.0, "failed": "full"}]
    (tmp_path / "figure2.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    written = reproduce.write_all(tmp_path)
    assert (tmp_path / "figure2.md").read_text().splitlines() == [
        "|  | encode | decode | update | s a step | peak GiB |", "| --- | --- | --- | --- | --- | --- |",
        "| grpo_tts embedded on 2 CPU cores |  | 0.50 | 1.50 | 2.00 | 2.0 |",
        "| grpo_asr real --micro 8 under 8 GiB on H100 | 0.25 |  | 1.00 | 1.25 | 4.5 |"]
    assert [p.name for p in written] == ["figure2.md", "figure2.png"] and written[1].stat().st_size > 5_000


def test_a_page_gets_the_tables_that_it_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("results").mkdir()
    Path("results/table2.md").write_text("| new |\n")
    Path("page.md").write_text("a\n<!-- results/table2.md -->\n| old |\n| old |\n<!-- end -->\nb\n")
    reproduce.refresh("page.md")
    assert Path("page.md").read_text() == "a\n<!-- results/table2.md -->\n| new |\n<!-- end -->\nb\n"


def test_every_row_has_a_folder_of_its_own_and_flags_that_its_script_takes():
    import diffro_tts
    import grpo_asr
    import grpo_tts

    scripts = {"grpo_asr.py": grpo_asr, "grpo_tts.py": grpo_tts, "diffro_tts.py": diffro_tts}
    for what, rows in reproduce.ROWS.items():
        assert len({reproduce.folder_of("", what, name, 1) for name in rows}) == len(rows)
        for script, flags in rows.values():
            scripts[script].parse_args(flags.split())


def test_a_run_that_is_there_is_not_repeated_and_one_that_fails_is_named(tmp_path, monkeypatch):
    results = tmp_path / "results"
    leave_run(results, "table2", "DiffRO", 1, 0.05)
    asked = ["--table", "2", "--rows", "DiffRO", "--results", str(results), "--seeds"]
    reproduce.main([*asked, "1"])
    monkeypatch.setitem(reproduce.ROWS["table2"], "DiffRO", ("grpo_tts.py", "--model nowhere --steps 1"))
    with pytest.raises(SystemExit, match=r"1 runs failed.*diffro-seed2.txt") as stopped:
        reproduce.main([*asked, "2"])
    assert "no such folder" in Path(str(stopped.value).split()[-1]).read_text()


@pytest.mark.parametrize("what, rows", [("table1", ["supervised", "D0 to D3"]), ("figure3", ["DiffRO"]),
                                        ("table2", ["GRPO, R1,2,3", "+ filter, R1,2"]),
                                        ("table3", ["DiffRO, B 32, G 1", "DiffRO over recordings, B 16"])])
def test_rows_run(what, rows):
    """--quick, of rows of every kind: all of them take 5 minutes."""
    shutil.rmtree(f"runs/quick/{what}", ignore_errors=True)
    reproduce.main([f"--{what[:-1]}", what[-1], "--quick", "--jobs", "2", "--rows", *rows])
    assert set(reproduce.found("runs/quick", what)) == set(rows)
    assert Path("runs/quick", f"{what}.png").exists()


@pytest.mark.parametrize("flags, message", [(["--table", "2", "--rows", "GRPO R9"], "no such row"),
                                            (["--device", "cpu"], "need --table")])
def test_mistakes_are_named(flags, message, capsys):
    with pytest.raises(SystemExit):
        reproduce.parse_args(flags)
    assert message in capsys.readouterr().err
