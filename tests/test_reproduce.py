"""The experiments: what is run, what is kept of a run, and that tables and pictures are made of what is kept."""
import json
import random
import re
import shutil
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import diffro_tts
import grpo_asr
import grpo_tts
from data import load_folder, load_sentences
from tools import measure, reproduce

SCRIPTS = {"grpo_asr.py": grpo_asr, "grpo_tts.py": grpo_tts, "diffro_tts.py": diffro_tts}
RUNS = reproduce.RUNS.resolve()
BEFORE = dict(wer=0.2, similarity=0.8, length_ratio=1.0, f0_spread=2.5, truncated=0.0, repetition=0.01)


SUMMARY = {"seconds": 3, "last": 0.05, "test": {"plain": {"before": BEFORE, "after": {**BEFORE, "wer": 0.05}}}}


def tables_of(results):
    there = [path.stem for path in results.glob("*.jsonl") if path.stem != "figure2"]
    return reproduce.make_tables({what: reproduce.runs_of(results, what) for what in there},
                                 reproduce.phase_rows(results))


def speech_line(row, seed, wer):
    """A line of a run of chapter 2 or 3."""
    after = {**BEFORE, "wer": wer, "similarity": 0.9}
    sets = {name: {"before": BEFORE, "after": after} for name in ("plain", "hard")}
    return {"row": row, "seed": seed, "script": "grpo_tts.py", "arguments": {}, "curve": {"eval_wer": {"0": 0.2}},
            "summary": {"seconds": 1, "test": sets}}


class Stub:
    """subprocess.run that leaves what a script leaves, or fails; `started` are the commands."""

    def __init__(self, status=0):
        self.status, self.started = status, []

    def __call__(self, command, **_):
        self.started.append(command)
        given = dict(zip(command, command[1:]))
        folder, script = Path(given.get("--out", "nowhere")), command[1]
        if "--resume" in given:
            Path(given["--resume"], "summary.json").write_text(json.dumps(SUMMARY))
        elif script in SCRIPTS and not self.status:
            try:
                arguments = vars(SCRIPTS[script].parse_args(command[2:]))
            except SystemExit:                              # would end the pool's thread, and nobody would hear of it
                raise ValueError(f"{script} does not take {command[2:]}") from None
            header = {"arguments": arguments, "commit": "abc", "versions": {}, "device": "cpu",
                      "dtype": "torch.float32"}
            evaluation = {"step": 0, "eval": {**BEFORE, "wer": 0.05}, "eval_wer": 0.05}
            rows = [header, {"step": -1, "eval": BEFORE, "eval_wer": 0.2}, {"step": 0, "kl": 0.1}, evaluation]
            folder.mkdir()
            (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            (folder / "summary.json").write_text(json.dumps(SUMMARY))
        return Namespace(returncode=self.status)


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """No script is started, and everything is written under tmp_path."""
    monkeypatch.chdir(tmp_path)
    stub = Stub()
    monkeypatch.setattr(subprocess, "run", stub)
    return stub


# ---- docs/runs -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("what", [what for what in reproduce.ROWS if (RUNS / f"{what}.jsonl").exists()])
def test_every_line_is_of_the_row_that_it_names(what):
    """The arguments of a line are what the flags of its row give today, but for flags that are no more."""
    path = RUNS / f"{what}.jsonl"
    lines = reproduce.read_lines(path)
    texts = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(texts) == len({(line["row"], line["seed"]) for line in lines})
    for line in lines:
        script, flags = reproduce.ROWS[what][line["row"]]
        asked, defaults = (vars(SCRIPTS[script].parse_args(f)) for f in (flags.split(), []))
        different = {k: v for k, v in asked.items() if v != defaults[k] and k != "device"}
        assert line["script"] == script and different == {k: v for k, v in line["arguments"].items() if k in defaults}
        assert line["dtype"] == ("torch.float32" if line["device"].startswith("cpu") else "torch.bfloat16")
        assert line["device"].startswith("NVIDIA") or asked["device"] == "auto"
        evaluated = list(line["curve"]["eval_wer"].values())
        first = next(iter(line["summary"]["test"].values()))
        assert [line["summary"][when] for when in ("before", "after")] == [first[w]["wer"] for w in ("before", "after")]
        assert line["summary"]["best"] == min(evaluated) and line["summary"]["last"] == evaluated[-1]      # on dev
    rows = {name: [line["seed"] for line in lines if line["row"] == name] for name in reproduce.ROWS[what]}
    assert all(seeds == sorted(seeds) and set(seeds) <= {1, 2, 3} for seeds in rows.values())


def test_docs_runs_is_small_and_holds_nothing_else():
    files = {path.name: path.stat().st_size for path in RUNS.iterdir()}
    known = {f"{what}.jsonl" for what in [*reproduce.ROWS, "figure2"]}
    assert set(files) <= {*known, "table1-cpu.jsonl"}
    assert sum(files.values()) < 2e6


def test_the_tables_of_the_pages_are_those_of_the_lines():
    pages = "".join(path.read_text(encoding="utf-8") for path in [Path("README.md"), *Path("docs").glob("*.md")])
    found = dict(re.findall(r"<!-- (\S+) -->\n([^<]*)<!-- end -->", pages))
    assert found == tables_of(RUNS)
    assert {path.name for path in Path("docs/pictures").iterdir()} == set(re.findall(r"pictures/(\S+?\.png)", pages))


def test_the_order_of_the_lines_changes_no_table(tmp_path):
    for path in RUNS.iterdir():
        lines = path.read_text(encoding="utf-8").splitlines()
        if path.stem in reproduce.ROWS:                     # of the others the order is that of the lines
            random.Random(0).shuffle(lines)
        (tmp_path / path.name).write_text("\n".join(lines) + "\n")
    assert tables_of(tmp_path) == tables_of(RUNS)
    for what in (path.stem for path in RUNS.iterdir() if path.stem in reproduce.ROWS):     # a mean's last bit, too
        assert reproduce.runs_of(tmp_path, what) == reproduce.runs_of(RUNS, what)


def test_figure_2_can_be_measured_again(stub, monkeypatch):
    """Every line of docs/runs is a command that the script of today takes: on a CPU what a CPU did, on a GPU all."""
    monkeypatch.setattr(reproduce, "RUNS", RUNS)
    lines = [line for line in reproduce.read_lines(RUNS / "figure2.jsonl") if "seconds" in line]
    for cuda in (False, True):
        stub.started.clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        reproduce.main(["--figure", "2", "--results", "mine", "--lr", "1e-5"])
        there = {(line["script"], line["size"], line["gib"], line["flags"]) for line in lines
                 if cuda or line["device"].startswith("cpu")}
        asked = set()
        for command in stub.started:
            assert command[1:3] == ["-m", "tools.measure"] and command[-2:] == ["--log", "mine/figure2.jsonl"]
            args = measure.parse_args(command[3:])
            SCRIPTS[f"{args.script}.py"].parse_args(args.flags)
            more = ["--seconds", str(args.seconds)] if args.seconds != 10 else []
            assert args.flags[-2:] == ["--lr", "1e-5"]
            asked.add((args.script, args.size, args.gib, " ".join([*args.flags[:-2], *more])))
        assert asked == there and len(stub.started) == len(there) and len(there) > (30 if cuda else 5)


# ---- what is run, and what is kept of it ---------------------------------------------------------------------------

def test_a_missing_run_is_run_and_gets_a_line_and_one_that_is_there_is_not(stub, capsys):
    path = Path("mine/table2.jsonl")
    reproduce.append_line(path, speech_line("DiffRO, R1", 1, 0.05))
    kept = path.read_bytes()
    asked = ["--table", "2", "--rows", "DiffRO, R1", *"--seeds 1 2 3 --jobs 2 --results mine --lr 1".split()]
    reproduce.main(asked)
    flags = [*reproduce.ROWS["table2"]["DiffRO, R1"][1].split(), "--seed"]
    assert sorted(command[1:] for command in stub.started) == [
        ["diffro_tts.py", *flags, seed, "--out", f"runs/reproduce/mine-table2-diffro-r1-seed{seed}", "--lr", "1"]
        for seed in "23"]
    assert path.read_bytes().startswith(kept) and Path("runs/reproduce/mine-table2-diffro-r1-seed2/log.jsonl").exists()
    _, two, _ = sorted(reproduce.read_lines(path), key=lambda line: line["seed"])
    assert two == {"row": "DiffRO, R1", "seed": 2, "script": "diffro_tts.py", "commit": "abc", "versions": {},
                   "arguments": {"lr": 1.0, "steps": 80, "micro": 64, "eval_every": 20, "eval_samples": 4},
                   "device": "cpu", "dtype": "torch.float32", "summary": SUMMARY,
                   "curve": {"kl": {"0": 0.1}, **{f"eval_{key}": {"0": value, "1": 0.05 if key == "wer" else value}
                                                  for key, value in BEFORE.items()}}}
    assert "| DiffRO, R1 | 3 | 5.0 |" in capsys.readouterr().out and Path("mine/table2.png").exists()
    reproduce.main(asked)
    assert len(stub.started) == 2 and len(path.read_text(encoding="utf-8").splitlines()) == 3


def test_a_run_that_was_stopped_goes_on_and_one_at_its_end_begins_anew(stub):
    """With the row's own flags beside --resume, so that the script refuses where the stopped run had others."""
    asked = ["--table", "2", "--rows", "DiffRO, R1", "--seeds", "2", "--results", "mine", "--lr", "1"]
    folder, lines = Path("runs/reproduce/mine-table2-diffro-r1-seed2"), Path("mine/table2.jsonl")
    reproduce.main(asked)
    for left, behind in (("state.pt", ["--resume", str(folder)]), ("state.pt summary.json", []), ("", [])):
        lines.unlink()
        (folder / "summary.json").unlink()
        for name in left.split():
            (folder / name).write_text(json.dumps(SUMMARY))
        reproduce.main(asked)
        assert stub.started[-1] == stub.started[0] + behind and len(reproduce.read_lines(lines)) == 1
        assert (folder / "state.pt").exists() == bool(behind)


def test_every_row_and_seed_has_a_folder_of_its_own(stub, monkeypatch):
    monkeypatch.setattr(reproduce, "draw_pictures", lambda *_: [])
    for what in ("table2", "table2-ours", "figure3"):
        kind, which = re.fullmatch(r"(table|figure)(.*)", what).groups()
        reproduce.main([f"--{kind}", which, "--seeds", "1", "2", "--jobs", "4", "--results", "mine"])
    folders = {command[command.index("--out") + 1] for command in stub.started}
    rows = sum(len(reproduce.ROWS[what]) for what in ("table2", "table2-ours", "figure3"))
    assert len(stub.started) == len(folders) == 2 * rows


def test_a_run_that_fails_is_named_and_gets_no_line(stub):
    stub.status = 1
    with pytest.raises(SystemExit, match=r"1 runs failed.*mine-table2-diffro-r1-seed2\.txt"):
        reproduce.main(["--table", "2", "--rows", "DiffRO, R1", "--seeds", "2", "--results", "mine"])
    assert not Path("mine").exists() and Path("runs/reproduce/mine-table2-diffro-r1-seed2.txt").exists()


def test_a_line_that_was_cut_off_is_named_run_again_and_harms_no_other(stub, capsys):
    path = Path("mine/table2.jsonl")
    whole, cut = (json.dumps(speech_line("DiffRO, R1", seed, 0.05)) for seed in (1, 2))
    path.parent.mkdir()
    path.write_text(whole + "\n" + cut[:len(cut) // 2])
    reproduce.main(["--table", "2", "--rows", "DiffRO, R1", "--seeds", "1", "2", "--results", "mine"])
    assert "mine/table2.jsonl: line 2 was cut off" in capsys.readouterr().out
    assert [line["seed"] for line in reproduce.read_lines(path)] == [1, 2] and len(stub.started) == 1
    path.write_text(whole)                                  # only the end of the line is missing
    assert [line["seed"] for line in reproduce.read_lines(path)] == [1]
    reproduce.append_line(path, json.loads(cut))
    assert path.read_text(encoding="utf-8") == f"{whole}\n{cut}\n"
    path.write_text(cut[:len(cut) // 2])                    # and no other line is there: no table, no error
    assert tables_of(path.parent) == {}


def test_a_flag_that_comes_or_goes_changes_no_line_and_repeats_no_run(stub, monkeypatch):
    today = vars(grpo_asr.parse_args([]))
    changed = {**today, "brand_new": 7, "lr": 1.0}
    del changed["beta"], changed["rewards"]
    monkeypatch.setattr(grpo_asr, "parse_args", lambda argv=None: Namespace(**changed))
    given = {**today, "seed": 5, "out": "x", "device": "cuda", "resume": "y"}
    Path("run").mkdir()
    header = {"arguments": given, "commit": "abc", "versions": {}, "device": "H100", "dtype": "torch.bfloat16"}
    Path("run/log.jsonl").write_text(json.dumps(header) + "\n")
    Path("run/summary.json").write_text("{}")
    line = reproduce.line_of(Path("run"), "R1 x D0", 5, "grpo_asr.py")
    assert line["arguments"] == {"beta": today["beta"], "rewards": "R1", "lr": today["lr"]}     # not today's defaults
    for path in RUNS.iterdir():
        shutil.copy(path, ".")
    monkeypatch.setattr(reproduce, "draw_pictures", lambda *_: [])
    reproduce.main(["--table", "1", "--rows", "R1 x D0", "--seeds", "1", "--results", "."])
    assert not stub.started


def test_quick_is_small_on_two_clips_of_every_set(stub, monkeypatch):
    monkeypatch.setattr(reproduce, "draw_pictures", lambda *_: [])
    Path("data").symlink_to(RUNS.parent.parent / "data")
    for what in ("table1", "table2"):
        stub.status = what == "table1"                      # its stub leaves no test sets
        try:
            reproduce.main(["--table", what[-1], "--quick", "--steps", "3"])
        except SystemExit:
            pass
    by_script = {command[1]: SCRIPTS[command[1]].parse_args(command[2:]) for command in stub.started}
    assert set(by_script) == set(SCRIPTS) and {args.steps for args in by_script.values()} == {3}
    assert {args.batch for args in by_script.values()} == {2}
    assert [Path(folder).name for folder in by_script["grpo_asr.py"].test] == [
        "keywords", "long", "noise", "open", "short"]
    assert [len(load_folder(folder)) for folder in by_script["grpo_asr.py"].test] == [2] * 5
    given = by_script["diffro_tts.py"]
    assert [len(load_sentences(path)) for path in (*given.test, given.dev)] == [2] * 3
    assert Path("runs/quick/table2.jsonl").exists()


@pytest.mark.parametrize("flags, message", [
    (["--table", "2", "--rows", "GRPO R9"], "no such row"), (["--device", "cpu"], "need --table"),
    (["--figure", "2", "--rows", "GRPO"], "no such row"), (["--table", "4"], "invalid choice")])
def test_mistakes_are_named(flags, message, capsys):
    with pytest.raises(SystemExit):
        reproduce.parse_args(flags)
    assert message in capsys.readouterr().err


# ---- tables --------------------------------------------------------------------------------------------------------

def test_the_table_is_the_mean_and_range_of_the_best_adapters(tmp_path):
    for row, seed, wer in (("GRPO, R1", 3, 0.14), ("GRPO, R1", 1, 0.9), ("DiffRO, R1", 1, 0.05), ("GRPO, R1", 2, 0.12),
                           ("a row of long ago", 1, 0.5), ("GRPO, R1", 1, 0.10)):          # the last of several counts
        reproduce.append_line(tmp_path / "table2.jsonl", speech_line(row, seed, wer))
    assert tables_of(tmp_path)["table2"].splitlines() == [
        "|  | seeds | plain WER | hard WER | SS | length | F0 spread | hard loops | hard no end | paper zh | paper en "
        "|",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| no RL |  | 20.0 | 20.0 | 0.800 | 1.000 | 2.50 | 1.0 | 0.0 | 4.280 / 77.64 | 6.074 / 70.87 |",
        "| DiffRO, R1 | 1 | 5.0 | 5.0 | 0.900 | 1.000 | 2.50 | 1.0 | 0.0 | 3.418 / 77.00 | 5.690 / 70.01 |",
        "| GRPO, R1 | 3 | 12.0 (10.0 to 14.0) | 12.0 (10.0 to 14.0) | 0.900 | 1.000 | 2.50 | 1.0 | 0.0 | 3.710 / 77.26 "
        "| 5.974 / 70.26 |"]


def test_figure_2_has_a_row_for_what_ran_where_and_the_last_measurement_counts(tmp_path):
    line = {"script": "grpo_asr", "size": "real", "gib": 8.0, "flags": "--max-tokens 48 --micro 8", "peak_gib": 4.5,
            "device": "NVIDIA H100 80GB HBM3"}
    for each in ({**line, "seconds": {"encode": 9.0, "update": 9.0}},
                 {**line, "seconds": {"encode": 0.25, "update": 1.0}},
                 {"script": "grpo_tts", "size": "embedded", "gib": None, "flags": "", "device": "cpu, 2 threads",
                  "peak_gib": 2.0, "seconds": {"decode": 0.5, "update": 1.5}}, {**line, "gib": 4.0, "failed": "full"}):
        reproduce.append_line(tmp_path / "figure2.jsonl", each)
    assert tables_of(tmp_path)["figure2"].splitlines() == [
        "|  | encode | decode | update | s a step | peak GiB |", "| --- | --- | --- | --- | --- | --- |",
        "| grpo_tts embedded on 2 CPU cores |  | 0.50 | 1.50 | 2.00 | 2.0 |",
        "| grpo_asr real --micro 8 under 8 GiB on H100 | 0.25 |  | 1.00 | 1.25 | 4.5 |"]
    assert [p.name for p in reproduce.draw_pictures({what: {} for what in reproduce.ROWS},
                                                    reproduce.phase_rows(tmp_path), tmp_path)] == ["figure2.png"]


def test_a_page_gets_the_tables_that_it_names_and_keeps_the_rest(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- note -->\n<!-- table1 -->\n| old |\n| old |\n<!-- end -->\nb\n<!-- table1-8bit -->\nc\n"
                    "<!-- table2 -->\n<!-- end -->\n")
    reproduce.refresh(page, {"table1": "| new |\n", "table1-8bit": "| not |\n", "table2": "| two |\n"})
    assert page.read_text(encoding="utf-8") == (
        "a\n<!-- note -->\n<!-- table1 -->\n| new |\n<!-- end -->\nb\n<!-- table1-8bit -->\nc\n"
        "<!-- table2 -->\n| two |\n<!-- end -->\n")
