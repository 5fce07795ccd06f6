"""Data folders in every form that users have, and in every form that is wrong."""
import json

import numpy as np
import pytest
import soundfile as sf

from data import batch_indices, load_folder
from engine.audio import DataError, read_audio
from engine.log import RunLog, logged_arguments
from engine.models import load_pretrained
from engine.run import pick_device

RATE = 16_000


def tone(seconds=1.0, rate=RATE, channels=1):
    wave = 0.3 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)
    return np.stack([wave] * channels, 1).astype(np.float32)


def folder_with(tmp_path, *lines, **files):
    for name, (wave, rate, options) in files.items():
        sf.write(tmp_path / options.pop("name", f"{name}.wav"), wave, rate, **options)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (tmp_path / "metadata.jsonl").write_text(text + "\n")
    return tmp_path


GOOD = {"file_name": "a.wav", "text": "hello"}


@pytest.mark.parametrize("suffix, rate, channels", [
    (".wav", 8000, 1), (".wav", 48000, 2), (".flac", 22050, 1), (".ogg", 16000, 2), (".mp3", 44100, 1)])
def test_any_rate_channels_and_format(tmp_path, suffix, rate, channels):
    sf.write(tmp_path / f"a{suffix}", tone(1.0, rate, channels), rate)
    folder_with(tmp_path, {"file_name": f"a{suffix}", "text": "hello", "keywords": ["hello"], "snr_db": None})
    [utterance] = load_folder(tmp_path)
    wave = utterance.waveform(RATE)
    assert wave.ndim == 1 and wave.dtype == np.float32 and abs(len(wave) - RATE) < 0.1 * RATE
    spectrum = np.abs(np.fft.rfft(wave[:8000]))
    assert abs(spectrum.argmax() * RATE / 8000 - 440) < 5                      # the pitch survives resampling
    assert utterance.keywords == ("hello",)


BAD = {
    "missing": ([GOOD, {"file_name": "b.wav", "text": "x"}], "b.wav: no such file"),
    "json": ([GOOD, "{not json"], "not JSON"),
    "list": ([GOOD, "[1, 2]"], "not a JSON object"),
    "no text": ([GOOD, {"file_name": "a.wav"}], 'needs "text" as a string'),
    "null text": ([GOOD, {"file_name": "a.wav", "text": None}], 'needs "text" as a string'),
    "no file": ([GOOD, {"text": "x"}], 'needs "file_name" as a string'),
    "keywords": ([GOOD, {**GOOD, "keywords": "anna"}], '"keywords" must be a list of strings'),
    "broken": ([GOOD, {"file_name": "broken.wav", "text": "x"}], "cannot be read as audio"),
    "empty file": ([GOOD, {"file_name": "empty.wav", "text": "x"}], "cannot be read as audio"),
    "folder": ([GOOD, {"file_name": ".", "text": "x"}], "cannot be read as audio"),
    "half a character": ([GOOD, '{"file_name": "a.wav", "text": "\\ud83d"}'], "lone surrogate"),
    "long name": ([GOOD, {"file_name": "a" * 300 + ".wav", "text": "x"}], "no such file"),
    "raw": ([GOOD, {"file_name": "a.raw", "text": "x"}], "cannot be read as audio"),
    "zero length": ([GOOD, {"file_name": "zero.wav", "text": "x"}], "0.00 s long"),
    "nan": ([GOOD, {"file_name": "nan.wav", "text": "x"}], "3 samples that are not numbers"),
    "too long": ([GOOD, {"file_name": "long.wav", "text": "x"}], "over --max-seconds 2"),
}


@pytest.fixture
def bad_folder(tmp_path):
    nan = tone()
    nan[10:13] = np.nan
    for name, wave in {"a": tone(), "zero": tone(0), "nan": nan, "long": tone(3.0)}.items():
        sf.write(tmp_path / f"{name}.wav", wave, RATE, subtype="FLOAT")
    (tmp_path / "broken.wav").write_bytes(b"RIFF of another kind")
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "a.raw").write_bytes(bytes(1000))
    return tmp_path


@pytest.mark.parametrize("case", BAD)
def test_bad_line_is_named_with_file_and_line(bad_folder, case, capsys):
    lines, message = BAD[case]
    folder_with(bad_folder, *lines)
    with pytest.raises(DataError) as error:
        load_folder(bad_folder, max_seconds=2)
    text = str(error.value)
    assert "metadata.jsonl:2:" in text and message in text and "--skip-bad" in text and "\n" not in text
    assert len(load_folder(bad_folder, max_seconds=2, skip_bad=True)) == 1
    said = capsys.readouterr().err
    assert "metadata.jsonl:2:" in said and "1 of 2 lines skipped" in said


def test_folder_without_metadata_without_lines_and_none_at_all(tmp_path):
    with pytest.raises(DataError, match="no metadata.jsonl"):
        load_folder(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        load_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="nothing usable in it"):
        load_folder(folder_with(tmp_path, ""))
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        load_folder(tmp_path)


def test_blank_lines_and_byte_order_marks_are_no_errors(tmp_path):
    sf.write(tmp_path / "a.wav", tone(), RATE)
    (tmp_path / "metadata.jsonl").write_text("\ufeff" + json.dumps(GOOD) + "\n\n" + json.dumps(GOOD))
    assert len(load_folder(tmp_path)) == 2


def test_max_seconds_zero_is_any(bad_folder):
    folder_with(bad_folder, {"file_name": "long.wav", "text": "x"})
    assert load_folder(bad_folder, max_seconds=0)[0].seconds == 3


def test_audio_is_decoded_once(tmp_path, monkeypatch):
    sf.write(tmp_path / "a.wav", tone(), RATE)
    first = read_audio(tmp_path / "a.wav", RATE)
    monkeypatch.setattr("soundfile.read", None)
    assert read_audio(tmp_path / "a.wav", RATE) is first


# ---- batches -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("count, batch", [(10, 4), (8, 8), (7, 3), (5, 5)])
def test_every_epoch_visits_everything_once_in_its_own_order(count, batch):
    stream = [i for step in range(3 * count) for i in batch_indices(step, count, batch, seed=3)]
    epochs = [stream[i:i + count] for i in range(0, 3 * count, count)]
    assert all(sorted(e) == list(range(count)) for e in epochs)
    assert count < 7 or epochs[0] != epochs[1]


def test_batches_depend_on_seed_and_step_alone():
    assert batch_indices(5, 100, 8, 1) == batch_indices(5, 100, 8, 1) != batch_indices(5, 100, 8, 2)


# ---- the run log, devices, models --------------------------------------------------------------------------

def test_a_folder_of_a_run_that_saved_nothing_can_be_used_again(tmp_path):
    RunLog(tmp_path / "run", {"arguments": {"seed": 1}}).write("log", {"step": -1})
    RunLog(tmp_path / "run", {"arguments": {"seed": 2}})
    assert [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()] == [{"arguments": {"seed": 2}}]


def test_a_run_is_never_written_over(tmp_path):
    RunLog(tmp_path / "run", {"arguments": {}})
    (tmp_path / "run" / "state.pt").touch()
    with pytest.raises(DataError, match="--resume"):
        RunLog(tmp_path / "run", {"arguments": {}})


def test_resuming_drops_what_came_after_the_saved_step(tmp_path):
    log = RunLog(tmp_path, {"arguments": {}})
    for step in range(5):
        log.write("log", {"step": step, "reward": 1 / 3})
    RunLog(tmp_path, {"arguments": {}}, resume_at=3)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert "arguments" in lines[0] and [r["step"] for r in lines[1:-1]] == [0, 1, 2] and lines[1]["reward"] == 0.333333
    assert lines[-1] == {"resumed": 3, "arguments": {}}


def test_what_changed_at_a_resume_is_not_lost_at_the_next(tmp_path):
    RunLog(tmp_path, {"arguments": {"steps": 5}}).write("log", {"step": 0})
    RunLog(tmp_path, {"arguments": {"steps": 9}}, resume_at=1)
    RunLog(tmp_path, {"arguments": logged_arguments(tmp_path)}, resume_at=1)               # killed before it had saved
    assert logged_arguments(tmp_path)["steps"] == 9


@pytest.mark.parametrize("name", ["no/such/folder", "./nowhere", "nowhere", "checkpoints/none", "/nowhere/at/all"])
def test_a_model_that_is_not_there_is_named(name):
    from transformers import AutoProcessor
    with pytest.raises(DataError, match="--model .*(no such folder|cannot be loaded)"):
        load_pretrained(AutoProcessor, name)


def test_a_folder_that_is_no_model_is_named(tmp_path):
    from transformers import AutoModelForMultimodalLM
    with pytest.raises(DataError, match="cannot be loaded"):
        load_pretrained(AutoModelForMultimodalLM, str(tmp_path))


def test_unknown_devices_are_named():
    import torch
    with pytest.raises(DataError, match="no such device"):
        pick_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(DataError, match="--device cpu"):
            pick_device("cuda")
        assert pick_device("auto").type == "cpu"
