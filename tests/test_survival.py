"""Runs that survive: kills, stops, full disks, damage, resumes of something else, and what others put into a folder.

KILLS=all python -m pytest tests/test_survival.py -k killed     tries every file operation of every script, not a few
"""
import contextlib
import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import traceback
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import soundfile as sf
import torch
import transformers as hf
from conftest import ROOT, first, untrained
from peft import PeftModel

import diffro_tts
import grpo_asr
import grpo_tts
from data import Sentence, load_folder, load_sentences, split_clips
from engine import log as engine_log
from engine import run as engine_run
from engine import sampling, speech
from engine.audio import DataError, read_audio
from engine.log import lock, read_rows
from engine.models import load_pretrained

RATE = 16_000
TIMING = ("seconds", "tokens_per_s", "peak_memory_gib", "peak_by_phase_gib", "phase_seconds")


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """{script: flags of a run of three steps on next to nothing}."""
    root = tmp_path_factory.mktemp("few")
    for name, count, folder in (("train", 3, "data/d1"), ("test", 2, "data/test/short")):
        (root / name).mkdir()
        (root / name / "metadata.jsonl").write_text("".join(
            json.dumps({"file_name": str(u.path.resolve()), "text": u.text}) + "\n" for u in first(count, folder)))
    for name, part in (("texts.txt", slice(0, 3)), ("test.txt", slice(3, 5))):
        (root / name).write_text("\n".join(s.text for s in load_sentences("data/tts/test/plain")[part]))
    few = ["--steps", "3", "--batch", "2", "--eval-every", "2", "--device", "cpu", "--lr", "1e-3"]
    def given(data, test):
        return ["--data", str(root / data), "--dev", str(root / test), "--test", str(root / test)]

    texts = [*given("texts.txt", "test.txt"), "--max-seconds", "1"]
    return {grpo_asr: [*few, "--group", "2", "--max-tokens", "12", *given("train", "test")],
            grpo_tts: [*few, *texts, "--group", "2"], diffro_tts: [*few, *texts]}


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMING}
    return value


def left_by(folder):
    """What a run has left, but for its times: adapter, last weights, log, samples, summary."""
    state = torch.load(folder / "state.pt", weights_only=True)
    return {"adapter": (folder / "adapter/adapter_model.safetensors").read_bytes(),
            "state": {name: weight.tolist() for name, weight in state["adapter"].items()},
            "chosen": (state["best"], state["best_step"], state["last"], state["step"]),
            "log": [without_times(row) for row in read_rows(folder / "log.jsonl") if "step" in row],
            "samples": read_rows(folder / "samples.jsonl"),
            "summary": without_times(json.loads((folder / "summary.json").read_text(encoding="utf-8"))),
            "files": sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))}


def stopped(main, *argv):
    """The one line that a main ends with."""
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in argv])
    assert len(str(end.value).splitlines()) == 1, end.value
    return str(end.value)


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    """A run of chapter 1, unbroken."""
    out = tmp_path_factory.mktemp("whole") / "run"
    grpo_asr.main([*flags[grpo_asr], "--out", str(out)])
    return out


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


# ---- kills -----------------------------------------------------------------------------------------------------

CHANGES = {"open": 0, "os.rename": 1, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0}      # event: its path


def in_a_child(main, argv, folder, kill_at=None):
    """main(argv) in a process of its own; SIGKILL just before its `kill_at`-th change to a file below `folder`, or in
    the middle of it where that is a line of a log. Returns how many there were, None where it was killed."""
    read, write = os.pipe()
    if child := os.fork():
        os.close(write)
        with open(read, "rb") as told:
            count = told.read()
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL), count.decode()
        return None if status else int(count)
    try:
        os.close(read)
        count = [0]

        def watch(event, given):
            if event not in CHANGES or not isinstance(given[CHANGES[event]], str | Path):
                return
            path = os.path.abspath(given[CHANGES[event]])
            if path.startswith(str(folder)) and (event != "open" or set(str(given[1])) & set("wax+")):
                count[0] += 1
                if count[0] == kill_at:
                    if path.endswith((".jsonl", "lock")) and os.path.exists(path):
                        with contextlib.suppress(OSError):
                            os.write(os.open(path, os.O_WRONLY | os.O_APPEND), b'{"step": 1, "rew')
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            main(argv)
        os.write(write, str(count[0]).encode())
        os._exit(0)
    except BaseException:  # noqa: BLE001
        os.write(write, traceback.format_exc().encode())
        os._exit(1)


@pytest.mark.parametrize("chapter", [grpo_asr, grpo_tts, diffro_tts], ids=lambda chapter: chapter.__name__)
def test_a_run_that_is_killed_anywhere_ends_as_if_it_had_not_been(flags, tmp_path, chapter):
    if chapter is not grpo_asr and "KILLS" not in os.environ:
        pytest.skip("KILLS=all tries all chapters; they share engine/run.py and engine/log.py")
    whole = tmp_path / "whole"
    points = in_a_child(chapter.main, [*flags[chapter], "--out", str(whole)], whole)
    assert points > 20
    expected = left_by(whole)
    every = range(1, points + 1) if "KILLS" in os.environ else (2, 3, points // 3, points // 2, points - 4, points)
    for point in every:
        out = tmp_path / f"at{point}"
        assert in_a_child(chapter.main, [*flags[chapter], "--out", str(out)], out, point) is None
        saved = (out / "state.pt").exists()
        again = ["--resume", str(out)] if saved else [*flags[chapter], "--out", str(out)]
        in_a_child(chapter.main, again, out)
        assert left_by(out) == expected, f"killed at {point} of {points}"
        shutil.rmtree(out)
    print(f"{chapter.__name__}: {len(every)} of {points} points")


def test_a_log_that_is_cut_off_or_ends_in_zeros_loses_its_last_line_alone(tmp_path):
    whole = b'{"arguments": {}}\n{"step": 0}\n{"step": 1}\n'
    for end in (b"", b'{"step": 2', b"\0" * 50, b"\0" * 50 + b"\n", b'{"step": 2}'):
        (tmp_path / "log.jsonl").write_bytes(whole + end)
        assert [row["step"] for row in read_rows(tmp_path / "log.jsonl")[1:]] == [0, 1]
    (tmp_path / "log.jsonl").write_bytes(whole.replace(b'"step": 0', b'"step": \0'))
    with pytest.raises(DataError, match="log.jsonl:2: is damaged, and more follows"):
        read_rows(tmp_path / "log.jsonl")


def test_a_run_without_evaluations_is_saved_now_and_then(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_run, "SAVE_EVERY", 2)
    out, real, seen = tmp_path / "run", grpo_asr.policy_figures, []

    def figures(*given):
        seen.append(1)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given)

    monkeypatch.setattr(grpo_asr, "policy_figures", figures)
    assert in_a_child(grpo_asr.main, [*flags[grpo_asr], "--eval-every", "0", "--out", str(out)], out) is None
    assert torch.load(out / "state.pt", weights_only=True)["step"] == 2


# ---- stops -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_stop_saves_the_step_at_hand_and_takes_no_part_in_the_choice(flags, finished, tmp_path, monkeypatch, name):
    out, real, seen = tmp_path / "run", grpo_asr.policy_figures, []
    before = signal.getsignal(getattr(signal, name))
    if before == signal.SIG_IGN:
        pytest.skip("switched off for all that is started here, as nohup does")

    def figures(*given):
        seen.append(1)
        if len(seen) == 1:
            os.kill(os.getpid(), getattr(signal, name))
        return real(*given)

    monkeypatch.setattr(grpo_asr, "policy_figures", figures)
    said = stopped(grpo_asr.main, *flags[grpo_asr], "--out", out)
    assert said == f"stopped: saved after 1 of 3 steps; python grpo_asr.py --resume {out} goes on"
    assert [row["step"] for row in read_rows(out / "log.jsonl") if "eval_wer" in row] == [-1]
    assert signal.getsignal(getattr(signal, name)) == before
    if name == "SIGTERM":
        grpo_asr.main(["--resume", str(out)])
        assert left_by(out) == left_by(finished)


def test_a_stop_before_the_first_step_and_in_the_last_evaluation_is_one_line(flags, copy, monkeypatch):
    def stop(*given):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(grpo_asr, "evaluate", stop)
    assert stopped(grpo_asr.main, *flags[grpo_asr], "--out", copy.parent / "new") == "stopped: nothing was trained"
    monkeypatch.setattr(grpo_asr, "load_adapter", stop)
    assert "saved after 3 of 3 steps; python grpo_asr.py --resume" in stopped(grpo_asr.main, "--resume", copy)


def test_what_was_switched_off_stays_off(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)                               # nohup
    try:
        engine_run.stop_with(signal.default_int_handler)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_a_stop_while_the_libraries_load_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    done = subprocess.run([sys.executable, str(ROOT / "grpo_asr.py")], cwd=ROOT, text=True, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1 and done.stderr == "stopped: nothing was trained\n", done.stderr


# ---- full disks ------------------------------------------------------------------------------------------------

def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["log", "state", "adapter", "summary"])
def test_a_full_disk_is_one_line_and_what_was_saved_goes_on(flags, finished, tmp_path, monkeypatch, where):
    out, seen = tmp_path / "run", []

    def at_the_second(module, name):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, **named: seen.append(1) or (full if len(seen) > 1 else real)(
            *given, **named))

    if where == "log":
        real = engine_log.as_line
        monkeypatch.setattr(engine_log, "as_line", lambda row: (full if row.get("step") == 1 else real)(row))
    elif where == "state":
        at_the_second(torch, "save")
    elif where == "adapter":
        wers = iter((0.9, 0.9, 0.5))                                                # a better adapter is to be kept
        monkeypatch.setattr(grpo_asr, "evaluate", lambda *given: ([""] * 2, {"wer": next(wers)}))
        at_the_second(PeftModel, "save_pretrained")
    else:
        real = Path.write_text
        monkeypatch.setattr(Path, "write_text", lambda path, *given, **named: (
            full if path.name.startswith("summary") else real)(path, *given, **named))
    said = stopped(grpo_asr.main, *flags[grpo_asr], "--out", out)
    assert "No space left on device" in said and f"python grpo_asr.py --resume {out} goes on" in said
    monkeypatch.undo()
    assert not list(out.glob("*.pt.tmp"))
    if where != "adapter":                                                          # whose figures are made up
        grpo_asr.main(["--resume", str(out)])
        assert left_by(out) == left_by(finished)


def test_a_folder_that_cannot_be_written_is_one_line(flags, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run"), tmp_path / ("x" * 300)):
        assert "cannot be written" in stopped(grpo_asr.main, *flags[grpo_asr], "--out", out)


# ---- damage ----------------------------------------------------------------------------------------------------

def damaged(folder, name):
    state, weights = folder / "state.pt", folder / "adapter/adapter_model.safetensors"
    content = bytearray(state.read_bytes())
    if name.startswith("flip"):
        content[len(content) * int(name[4:]) // 10] ^= 0xFF
        state.write_bytes(content)
    elif name == "empty":
        state.write_bytes(b"")
    elif name == "half":
        state.write_bytes(content[:len(content) // 2])
    elif name == "list":
        torch.save([1, 2], state)
    elif name == "partial":
        saved = torch.load(state, weights_only=True)
        saved["adapter"].popitem()
        torch.save(saved, state)
    elif name == "keys":
        saved = torch.load(state, weights_only=True)
        del saved["optimizer"]
        torch.save(saved, state)
    elif name == "other shapes":
        saved = torch.load(state, weights_only=True)
        saved["adapter"] = {k: v[:1] for k, v in saved["adapter"].items()}
        torch.save(saved, state)
    elif name == "no adapter":
        shutil.rmtree(folder / "adapter")
    elif name == "empty adapter":
        safetensors.torch.save_file({}, weights)
    elif name == "partial adapter":
        tensors = safetensors.torch.load_file(weights)
        tensors.popitem()
        safetensors.torch.save_file(tensors, weights)
    elif name == "nan adapter":
        tensors = safetensors.torch.load_file(weights)
        next(iter(tensors.values()))[0] = float("nan")
        safetensors.torch.save_file(tensors, weights)
    elif name == "cut adapter":
        weights.write_bytes(weights.read_bytes()[:-10])


@pytest.mark.parametrize("name", ["flip2", "flip5", "flip8", "empty", "half", "list", "partial", "keys",
                                  "other shapes", "no adapter", "empty adapter", "partial adapter", "nan adapter",
                                  "cut adapter"])
def test_damage_is_one_line_before_anything_runs(copy, name, monkeypatch):
    damaged(copy, name)
    monkeypatch.setattr(grpo_asr, "evaluate", None)
    monkeypatch.setattr(grpo_asr, "self_check", lambda *given: None)
    before = (copy / "log.jsonl").read_bytes()
    said = stopped(grpo_asr.main, "--resume", copy, "--steps", 4)
    assert said.startswith(f"error: --resume {copy}: its ") and ("damaged" in said)
    assert (copy / "log.jsonl").read_bytes() == before


def refusal(capsys, chapter, *argv):
    with pytest.raises(SystemExit) as end:
        chapter.parse_args([str(a) for a in argv])
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("changed, message", [
    (["--lr", "0.5"], "has --lr 0.001, not 0.5; only --steps, --eval-every, --micro, --device can change. --adapter"),
    (["--seed", "2"], "has --seed 1, not 2"), (["--beta", "0"], "has --beta 0.1, not 0.0"),
    (["--lora-rank", "8"], "has --lora-rank 16, not 8"), (["--test", "data/test/long"], "has --test"),
    (["--out", "elsewhere"], "has --out"), (["--data", "data/d0"], "has --data")])
def test_a_resume_with_other_settings_is_refused(finished, capsys, changed, message):
    assert message in refusal(capsys, grpo_asr, "--resume", finished, *changed)


def test_a_resume_may_raise_the_steps_and_repeat_what_was_given(finished):
    args = grpo_asr.parse_args(["--resume", str(finished), "--steps", "9", "--lr", "1e-3", "--out", f"{finished}/"])
    assert (args.steps, args.lr, args.batch, args.out) == (9, 1e-3, 2, str(finished))


def test_a_resume_of_another_scripts_run_is_refused(finished, copy, capsys):
    assert "is a run of grpo_asr.py" in refusal(capsys, grpo_tts, "--resume", finished)
    rows = read_rows(copy / "log.jsonl")
    del rows[0]["script"]                                                           # an older log
    (copy / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "was made by another script or version" in refusal(capsys, diffro_tts, "--resume", copy)


@pytest.mark.parametrize("flag", ["resume", "out", "adapter", "model", "data", "test", "language", "rewards"])
def test_an_empty_flag_is_no_default(capsys, flag):
    assert f"--{flag} is empty" in refusal(capsys, grpo_asr, f"--{flag}", "")
    assert f"--{flag} holds bytes that are no UTF-8" in refusal(capsys, grpo_asr, f"--{flag}", "a\udcff")


@pytest.mark.parametrize("name, value", [("steps", "many"), ("batch", [1]), ("lr", None), ("objective", "bliss"),
                                         ("skip_bad", 3), ("data", [1]), ("beta", float("nan")), ("steps", True)])
def test_a_log_with_wrong_arguments_is_one_line(copy, capsys, name, value):
    rows = read_rows(copy / "log.jsonl")
    rows[0]["arguments"][name] = value
    (copy / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit) as end:
        grpo_asr.main(["--resume", str(copy)])
    assert end.value.code == 2 and f"--{name.replace('_', '-')}" in capsys.readouterr().err.splitlines()[-1]


def test_two_processes_are_not_in_one_folder(finished, flags, tmp_path):
    held = lock(finished)
    said = stopped(grpo_asr.main, "--resume", finished)
    assert said == f"error: {finished}: process {os.getpid()} is at work in it"
    held.close()
    held = lock(tmp_path / "new")
    assert "is at work in it" in stopped(grpo_asr.main, *flags[grpo_asr], "--out", tmp_path / "new")
    held.close()
    lock(finished).close()


# ---- what others made ------------------------------------------------------------------------------------------

def test_no_code_of_a_model_folder_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *given: "y")
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w').write('ran')\n"
    for base, auto in (("asr", "AutoProcessor"), ("asr", "AutoModelForMultimodalLM"), ("tts", "AutoTokenizer"),
                       ("tts", "AutoModelForCausalLM"), ("codec", "AutoModel"), ("codec", "AutoFeatureExtractor"),
                       ("speaker", "AutoModelForAudioXVector"), ("token2text", "AutoModelForSeq2SeqLM")):
        folder = Path(shutil.copytree(f"checkpoints/{base}", tmp_path / f"{base}{auto}"))
        (folder / "evil.py").write_text(code + "class Evil:\n    pass\n")
        for file in folder.glob("*config.json"):
            config = json.loads(file.read_text(encoding="utf-8"))
            config["auto_map"] = dict.fromkeys((auto, "AutoConfig"), "evil.Evil")
            if file.name == "config.json":
                config["model_type"] = "evil"
            for key in ("processor_class", "tokenizer_class", "feature_extractor_type"):
                if key in config:
                    config[key] = "Evil"
            file.write_text(json.dumps(config))
        with contextlib.suppress(DataError):
            load_pretrained(getattr(hf, auto), str(folder))
        assert not ran.exists(), auto
    assert not ran.exists()


def test_no_pickle_of_a_run_runs(copy, tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    with zipfile.ZipFile(copy / "state.pt", "w") as parts:
        parts.writestr("archive/data.pkl", pickle.dumps(Evil()))
        parts.writestr("archive/version", "3\n")
    assert "damaged" in stopped(grpo_asr.main, "--resume", copy)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["state.pt.tmp", "adapter", "log.jsonl", "samples.jsonl", "deep/link"])
def test_nothing_outside_the_run_folder_is_written(copy, tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret 123\n")
    shutil.rmtree(copy / name) if (copy / name).is_dir() else (copy / name).unlink(missing_ok=True)
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).symlink_to(outside if name == "adapter" else outside / "secret")
    with pytest.raises(SystemExit) as end:
        grpo_asr.main(["--resume", str(copy)])
    assert "secret 123" not in str(end.value)
    assert [p.name for p in outside.iterdir()] == ["secret"] and (outside / "secret").read_text() == "secret 123\n"


# ---- audio -----------------------------------------------------------------------------------------------------

def noise(seconds=2.0):
    return (0.1 * np.random.default_rng(0).standard_normal(int(seconds * RATE))).astype(np.float32)


@pytest.mark.parametrize("suffix, options", [("wav", {}), ("wav", {"endian": "BIG"}), ("wav", {"subtype": "FLOAT"}),
                                             ("flac", {})])
def test_a_file_copied_in_part_is_named_where_its_header_tells(tmp_path, suffix, options):
    path = tmp_path / f"a.{suffix}"
    sf.write(path, noise(), RATE, **options)
    assert len(read_audio(path, RATE)) == 2 * RATE
    path.write_bytes(path.read_bytes()[:-path.stat().st_size // 3])
    with pytest.raises(DataError, match="copied in part|cannot be read as audio"):
        read_audio(path, 8000)


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0x7FFFFFFF, 0xFFFFF000])
def test_a_stream_without_its_length_is_whole(tmp_path, length):
    sf.write(tmp_path / "a.wav", noise(), RATE)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content[40:44] = length.to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(content)
    assert len(read_audio(tmp_path / "a.wav", RATE)) == 2 * RATE


def test_more_words_than_anyone_says_are_counted(tmp_path, capsys):
    for i in range(4):
        sf.write(tmp_path / f"{i}.ogg", noise(2.0 if i else 1.0) / (i + 1), RATE)
    rows = [{"file_name": f"{i}.ogg", "text": f"{i} sentence"} for i in range(1, 4)]
    rows.append({"file_name": "0.ogg", "text": "the first second of a sentence of eleven words is here"})
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    split_clips(grpo_asr.parse_args(["--data", str(tmp_path), "--batch", "1", "--seed", "2"]), RATE)
    said = "1 of 4 recordings say more than 7 tokens a second: cut short, or of another text?"
    assert f'{said} The first: "the first second' in capsys.readouterr().out


@pytest.mark.parametrize("value, message", [(1e20, "samples of 1e+20"), (32768.0, "samples of 3.28e+04"),
                                            (np.inf, "not numbers")])
def test_samples_beyond_sound_are_named(tmp_path, value, message):
    wave = noise()
    wave[100] = value
    sf.write(tmp_path / "a.wav", wave, RATE, subtype="FLOAT")
    with pytest.raises(DataError, match=message.replace("+", r"\+")):
        read_audio(tmp_path / "a.wav", RATE)


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "a.wav")
    with pytest.raises(DataError, match="not a regular file"):
        read_audio(tmp_path / "a.wav", RATE)
    os.mkfifo(tmp_path / "metadata.jsonl")
    with pytest.raises(DataError, match="no metadata.jsonl"):
        load_folder(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        load_sentences(tmp_path / "metadata.jsonl")


# ---- values ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flag", ["beta", "clip", "lr", "temperature", "max-seconds"])
@pytest.mark.parametrize("value", ["nan", "inf", "-1", "-inf", "x"])
def test_a_number_that_is_none_is_one_line(capsys, flag, value):
    assert f"--{flag}" in refusal(capsys, grpo_asr, f"--{flag}={value}")


@pytest.mark.parametrize("flag", ["steps", "batch", "group", "micro", "lora-rank", "eval-every", "max-tokens",
                                  "hotwords", "seed"])
@pytest.mark.parametrize("value", ["-1", "nan", "1e3", "", str(10 ** 30)])
def test_a_count_that_is_none_is_one_line(capsys, flag, value):
    assert f"--{flag}" in refusal(capsys, grpo_asr, f"--{flag}={value}")


@pytest.mark.parametrize("rewards", ["R1,R1", "R1,", "R1,R2,R3,R1", "r1"])
def test_a_reward_is_named_once(capsys, rewards):
    assert "each once" in refusal(capsys, grpo_asr, "--rewards", rewards)


def test_tokens_beyond_the_codec_are_named(loaded_once, speaking, tmp_path):
    count = speaking[0].codec.count
    (tmp_path / "metadata.jsonl").write_text("".join(
        json.dumps({"text": f"{i} birds sang", "tokens": [1, 2, 3, count if i == 5 else 4]}) + "\n" for i in range(20)))
    said = stopped(diffro_tts.main, "--teach", "recording", "--data", tmp_path, "--dev", "data/tts/dev", "--test",
                   "data/tts/test/plain", "--device", "cpu", "--out", tmp_path / "run", "--steps", 0)
    assert f"--data has token {count}, and --codec knows {count}" in said


def test_memory_that_is_not_there_is_one_line(flags, tmp_path, monkeypatch):
    def fails(*given, **named):
        raise errors.pop()

    errors = [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")]
    monkeypatch.setattr(grpo_asr, "sample", fails)
    for _ in range(2):
        assert "the memory is full; lower --micro" in stopped(
            grpo_asr.main, *flags[grpo_asr], "--out", tmp_path / "run")


def test_the_speech_check_warns_of_texts_hardly_read_and_stops_where_none_arrives(speaking, capsys, monkeypatch):
    studio, real = speaking[0], speech.prompt_ids
    texts = speech.cast([Sentence(f"sentence {i} here") for i in range(8)], studio.voices)
    with untrained(studio.policy):
        speech.check(studio, texts)
        assert "hardly" not in capsys.readouterr().out
        once, nearly = studio.prompts(texts[:2]), studio.prompts(texts[:2])
        nearly.embeds = nearly.embeds * (1 + 1e-4)
        given = studio.args, 20, studio.end
        sampling.self_check(studio.policy, once, nearly, *given, "another text")
        assert "the model hardly tells these texts apart" in capsys.readouterr().out
        with pytest.raises(DataError, match="What is asked does not reach this model"):
            sampling.self_check(studio.policy, once, nearly, *given, "other audio")
        monkeypatch.setattr(speech, "prompt_ids", lambda tokenizer, said, voices: real(
            tokenizer, ["a"] * len(said), voices))
        with pytest.raises(DataError, match="What is asked does not reach this model"):
            speech.check(studio, texts)


def test_a_folder_that_holds_folders_and_no_model_is_one_line(tmp_path):
    (tmp_path / "a.b").mkdir()
    with pytest.raises(DataError, match="cannot be loaded"):
        load_pretrained(hf.AutoModel, str(tmp_path))


def test_every_loader_refuses_code(monkeypatch):
    asked = []

    class Loader:
        @classmethod
        def from_pretrained(cls, name, **options):
            asked.append(options)
            raise OSError("no")

    with pytest.raises(DataError):
        load_pretrained(Loader, "checkpoints/asr")
    assert asked == [{"trust_remote_code": False}]


def test_the_last_wer_is_the_last(finished):
    summary = json.loads((finished / "summary.json").read_text(encoding="utf-8"))
    wers = [row["eval_wer"] for row in read_rows(finished / "log.jsonl") if "eval_wer" in row]
    assert summary["last"] == wers[-1] and summary["best"] == min(wers)
