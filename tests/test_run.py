"""The script itself on the embedded recogniser: a run, resume, interruption, mistakes of a user; what imports what."""
import ast
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, first

import diffro_tts
import grpo_asr
from engine import settings
from engine.log import logged_arguments

MODULES = {str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__"): path
           for pattern in ("*.py", "engine/*.py", "tools/*.py", "pretrain/*.py") for path in ROOT.glob(pattern)}
CHAPTERS = {"grpo_asr", "grpo_tts", "diffro_tts"}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Flags for twelve clips to train on and two test sets: eight utterances of `short`, four of `noise`."""
    root = tmp_path_factory.mktemp("sets")
    for name, folder, count in (("train", "data/d1", 12), ("short", "data/test/short", 8),
                                ("noise", "data/test/noise", 4)):
        (root / name).mkdir()
        (root / name / "metadata.jsonl").write_text("".join(
            json.dumps({"file_name": str(u.path.resolve()), "text": u.text, "keywords": list(u.keywords)}) + "\n"
            for u in first(count, folder)))
    return ["--data", str(root / "train"), "--dev", str(root / "short"), "--test", str(root / "noise"),
            str(root / "short"), "--device", "cpu", "--batch", "2", "--group", "2"]


def run(out, *flags):
    grpo_asr.main([*flags, "--out", str(out)])
    return [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]


GIVEN = ["--rewards", "R1,R2,R3", "--lr", "1e-3", "--temperature", "1.2", "--eval-every", "2"]


@pytest.fixture(scope="module")
def unbroken(sets, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    return out, run(out, *sets, *GIVEN, "--steps", "4")


# ---- a run ---------------------------------------------------------------------------------------------------

def test_a_run_leaves_everything_behind(unbroken):
    out, lines = unbroken
    header, rows = lines[0], [line for line in lines[1:] if "reward" in line]
    assert header["versions"]["torch"] == torch.__version__.split("+")[0]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for key in ("reward", "reward_std", "R1", "R2", "R3", "no_signal", "truncated", "tokens", "kl", "entropy",
                "clipped", "grad_norm", "lr", "tokens_per_s", "seconds", "peak_memory_gib", "peak_by_phase_gib",
                "repetition", "length_ratio", "empty"):
        assert all(key in row for row in rows), key
    assert set(rows[1]["seconds"]) >= {"encode", "rollout", "reward", "update"}
    assert [row["step"] for row in lines[1:] if "eval_wer" in row] == [-1, 1, 3]
    assert rows[0]["kl"] == 0 and rows[3]["kl"] > 0                            # pitfall 5; and it moved
    assert all(row["clipped"] == 0 for row in rows)                            # and stayed on its own policy
    taught = [row["grad_norm"] for row in rows if row["no_signal"] < 1]
    assert taught and min(taught) > 0
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    for key in ("metric", "before", "after", "best", "steps", "seconds", "phase_seconds", "peak_memory_gib", "test"):
        assert key in summary, key
    assert set(summary["test"]) == {"short", "noise"} and summary["best"] <= summary["before"]
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert samples[0]["best"]["total"] >= samples[0]["worst"]["total"] and samples[0]["said"]
    assert (out / "adapter" / "adapter_model.safetensors").exists()


def test_pitfall_23_the_log_holds_what_was_used(unbroken):
    given = unbroken[1][0]["arguments"]
    assert (given["steps"], given["temperature"], given["lr"]) == (4, 1.2, 1e-3) and unbroken[1][0]["seed"] == 1
    assert all(row["lr"] == 1e-3 for row in unbroken[1] if "reward" in row)
    state = torch.load(unbroken[0] / "state.pt", weights_only=True)
    assert state["optimizer"]["param_groups"][0]["lr"] == 1e-3


def test_resume_equals_the_unbroken_run_bit_for_bit(sets, unbroken, tmp_path):
    out = tmp_path / "run"
    run(out, *sets, *GIVEN, "--steps", "2")
    grpo_asr.main(["--resume", str(out), "--steps", "4"])
    a, b = ((f / "adapter" / "adapter_model.safetensors").read_bytes() for f in (unbroken[0], out))
    assert a == b
    a, b = (torch.load(f / "state.pt", weights_only=True)["adapter"] for f in (unbroken[0], out))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    timing = ("seconds", "tokens_per_s", "peak_memory_gib", "peak_by_phase_gib")
    same = lambda rows: [{k: v for k, v in r.items() if k not in timing} for r in rows[1:] if "reward" in r]  # noqa: E731
    assert same(lines) == same(unbroken[1])
    assert lines[0]["arguments"]["steps"] == 2 and logged_arguments(out)["steps"] == 4     # beside the old header
    assert next(line for line in lines if "resumed" in line)["arguments"] == {"steps": 4}
    a, b = (json.loads((f / "summary.json").read_text(encoding="utf-8"))["test"] for f in (unbroken[0], out))
    assert a == b


def test_the_supervised_control_trains_on_the_transcripts(sets, tmp_path):
    rows = run(tmp_path / "run", *sets, "--steps", "2", "--objective", "supervised", "--eval-every", "0")
    rows = [row for row in rows if "reward" in row]
    assert [row["R1"] for row in rows] == [1, 1] and [row["wer"] for row in rows] == [0, 0]
    assert all(row["grad_norm"] > 0 for row in rows) and rows[0]["kl"] == 0 < rows[1]["kl"]


def test_interruption_saves_and_says_how_to_go_on(sets, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "grpo_asr.py", *sets, "--out", str(out), "--steps", "5000",
                                "--eval-every", "0"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    log = out / "log.jsonl"
    while process.poll() is None and not (log.exists() and len(log.read_text(encoding="utf-8").splitlines()) > 3):
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    _, told = process.communicate()
    steps = torch.load(out / "state.pt", weights_only=True)["step"]
    assert process.returncode == 1 and steps >= 1, told
    assert told.splitlines()[-1] == (f"stopped: saved after {steps} of 5000 steps; python grpo_asr.py --resume {out} "
                                     "goes on")
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows if "eval_wer" in row] == [-1]          # its end is no part of the choice


# ---- mistakes ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, message", [
    (["--data", "nowhere"], "nowhere: no such folder"),
    (["--model", "nowhere"], "--model nowhere: no such folder"),
    (["--device", "cuda:9"], "--device cuda:9"),
    (["--batch", "100000"], "fewer than --batch"),
    (["--rewards", "R3", "--data", "data/test/noise"], "--rewards R3 needs keywords"),
    (["--language", "klingon"], "--language klingon"),
    (["--test", "data/test/noise"], "--test: nothing is said in it"),
    (["--dev", "data/test/noise"], "--dev: nothing is said in it"),
])
def test_a_users_mistake_gets_one_line(flags, message, sets):
    with pytest.raises(SystemExit) as stopped:
        grpo_asr.main([*sets, "--steps", "1", *flags])
    assert str(stopped.value).startswith("error: ") and message in str(stopped.value)
    assert len(str(stopped.value).splitlines()) == 1


BOTH = ["--method", "grpo+diffro"]


@pytest.mark.parametrize("chapter, flags, message", [
    (grpo_asr, ["--rewards", "R9"], "R1,R2,R3"), (grpo_asr, ["--micro", "5"], "--micro"),
    (grpo_asr, ["--group", "1"], "--group must be from 2"), (grpo_asr, ["--temperature", "0"], "--temperature"),
    (grpo_asr, ["--resume", "nowhere"], "no run there"), (grpo_asr, ["--steps", "many"], "--steps"),
    (grpo_asr, ["--quantize", "4bit"], "--quantize"), (diffro_tts, ["--filter", "positive"], "--filter"),
    (diffro_tts, ["--tau", "0"], "--tau"), (diffro_tts, [*BOTH, "--teach", "recording"], "--teach"),
    (diffro_tts, ["--group", "-1"], "--group"), (diffro_tts, [*BOTH, "--group", "1"], "--group")])
def test_a_wrong_flag_is_named(chapter, flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        chapter.parse_args(flags)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_help_and_a_wrong_flag_answer_without_torch():
    code = """import runpy, sys
sys.modules["torch"] = None
for name in sys.argv[1:]:
    for flag, status in (("--help", 0), ("--no-such-flag", 2)):
        sys.argv = [name, flag]
        try:
            runpy.run_module(name, run_name="__main__")
        except SystemExit as stopped:
            assert stopped.code == status, (name, flag, stopped.code)
        else:
            assert False, (name, flag)"""
    tools = [name for name in MODULES if name.startswith("tools.")]
    done = subprocess.run([sys.executable, "-c", code, *CHAPTERS, *tools, "pretrain"], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0 and done.stdout.count("usage: ") == len(CHAPTERS) + len(tools) + 1, done.stderr


# ---- modules -------------------------------------------------------------------------------------------------

def test_pitfall_24_modules_do_nothing_at_import():
    done = subprocess.run([sys.executable, "-c", "import importlib, sys; names = sys.argv[1:]\n"
                           "sys.argv = ['x', '--no-such-flag']\nfor name in names: importlib.import_module(name)",
                           *MODULES], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "", done.stderr


def imported(module):
    """The modules of this repository that `module` imports, wherever in it the import stands."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names & MODULES.keys()


def test_imports_have_no_circle_and_the_engine_knows_no_chapter():
    arrows = {module: imported(module) for module in MODULES}
    outside = {m for m in MODULES if m in CHAPTERS or m.split(".")[0] in ("tools", "pretrain")}
    assert {m for m in MODULES if "." not in m and MODULES[m].parent == ROOT} == CHAPTERS | {"rewards", "data"}
    assert not {(m, to) for m in MODULES.keys() - outside for to in arrows[m] & outside}
    while leaves := {m for m in arrows if not arrows[m] & arrows.keys()}:
        arrows = {m: to for m, to in arrows.items() if m not in leaves}
    assert not arrows, arrows


@pytest.mark.parametrize("idle, busy", [(40, False), (35, False), (30, True), (0, True)])
def test_another_programs_work_is_noticed(monkeypatch, idle, busy):
    """Two cores of ours, 1 and 3 of four, over a fifth of a second at 100 ticks: 40 ticks of idling if nobody works."""
    stats = iter("cpu  9 9 9 9 9\n" + "".join(f"cpu{core} 1 0 1 {a} {b} 0\n" for core, (a, b) in enumerate(
        [(7, 0), (5 + n, 0), (900 * n, 0), (3, n)])) for n in (0, idle // 2))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3}, raising=False)
    monkeypatch.setattr(os, "sysconf", lambda _: 100, raising=False)
    monkeypatch.setattr(settings.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(settings.time, "monotonic", iter([0.0, 0.2]).__next__)
    monkeypatch.setattr(settings.Path, "read_text", lambda path, encoding: next(stats))
    assert settings.others_work() is busy
