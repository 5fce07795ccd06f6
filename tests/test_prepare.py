"""Corpora in their published layouts, made small; pools chosen by hand."""
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from data import load_folder, load_sentences
from engine.audio import CACHE
from tools import prepare

RATE = 16_000
SAID = {"61-70968-0000": "HE BEGAN A CONFUSED COMPLAINT", "61-70968-0001": "LYNDE'S ALDERS AND LYNDE'S EARDROPS",
        "121-121726-0000": "ALSO A POPULAR CONTRIVANCE"}


def noise(seconds, seed=0):
    return 0.1 * np.random.default_rng(seed).standard_normal(int(seconds * RATE)).astype(np.float32)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def failure(*argv):
    """The one line that a mistake gets."""
    with pytest.raises(SystemExit) as stopped:
        prepare.main([str(a) for a in argv])
    message = str(stopped.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


@pytest.fixture
def libri(tmp_path):
    """A LibriSpeech of two speakers, in ROOT/LibriSpeech/test-clean."""
    for name, text in SAID.items():
        speaker, chapter, _ = name.split("-")
        folder = tmp_path / "root" / "LibriSpeech" / "test-clean" / speaker / chapter
        folder.mkdir(parents=True, exist_ok=True)
        sf.write(folder / f"{name}.flac", noise(0.5), RATE)
        with open(folder / f"{speaker}-{chapter}.trans.txt", "a", encoding="utf-8") as out:
            out.write(f"{name} {text}\n")
    return tmp_path / "root"


# ---- corpora -----------------------------------------------------------------------------------------------

def test_librispeech_becomes_a_data_folder_without_a_copy(libri, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prepare.main(["librispeech", "root", "--subset", "test-clean", "--out", "made/ls"])
    monkeypatch.chdir("/")                                      # the paths do not depend on where it was run
    found = load_folder(tmp_path / "made" / "ls")
    assert sorted(u.text for u in found) == sorted(text.lower() for text in SAID.values())
    assert {(u.path.stem, u.text) for u in found} == {(name, text.lower()) for name, text in SAID.items()}
    assert [u.voice for u in found] == [u.path.stem.split("-")[0] for u in found]
    assert all(u.path.is_relative_to(libri) and u.seconds == 0.5 and u.keywords == () for u in found)
    assert [f.name for f in (tmp_path / "made" / "ls").iterdir()] == ["metadata.jsonl"]
    assert "3 clips of" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["words.txt", "lists/words/all_rare_words.txt",
                                   "lists/ref/test-clean.biasing_100.tsv"])
def test_biasing_words_that_are_said_become_keywords(libri, tmp_path, where):
    path = tmp_path / where
    path.parent.mkdir(parents=True, exist_ok=True)
    rare = {"61-70968-0000": [], "61-70968-0001": ["lynde's", "alders", "eardrops"], "121-121726-0000": ["contrivance"]}
    if path.suffix == ".tsv":                                   # the published form: lower case, text, rare, biasing
        rare["61-70968-0001"] = ["alders", "eardrops", "lynde's"]
        path.write_text("".join(f"{name}\t{SAID[name].lower()}\t{json.dumps(words)}\t{json.dumps([*words, 'zion'])}\n"
                                for name, words in rare.items()))
    else:
        path.write_text("LYNDE'S\nALDERS\nearDrops\nCONTRIVANCE\nZION\n")
    given = tmp_path / where.split("/")[0]                      # the file, or the folder of lists
    prepare.main(["librispeech", str(libri), "--subset", "test-clean", "--out", str(tmp_path / "ls"),
                  "--biasing", str(given)])
    assert {Path(row["file_name"]).stem: row["keywords"] for row in rows_of(tmp_path / "ls")} == rare


def test_a_biasing_list_that_is_none_is_named(libri, tmp_path):
    given = ["librispeech", libri, "--subset", "test-clean", "--out", tmp_path / "ls", "--biasing"]
    assert "cannot be read" in failure(*given, tmp_path / "nowhere.txt")
    assert "test-clean.biasing_N.tsv" in failure(*given, tmp_path)
    (tmp_path / "words.txt").write_text("two words\n")
    assert "not a list of words" in failure(*given, tmp_path / "words.txt")
    (tmp_path / "bad.tsv").write_text("61-70968-0000\ttext\n")
    assert "its lines are not" in failure(*given, tmp_path / "bad.tsv")
    (tmp_path / "other.tsv").write_text("1-2-0003\ttext\t[]\t[]\n")
    assert "another subset" in failure(*given, tmp_path / "other.tsv")
    assert not (tmp_path / "ls").exists()


def test_ljspeech_and_libritts_are_sentences_and_voices(tmp_path):
    lj = tmp_path / "LJSpeech-1.1"
    (lj / "wavs").mkdir(parents=True)
    (lj / "metadata.csv").write_text('LJ001-0001|Printing, in 1440,|Printing, in "fourteen forty",\n'
                                     'LJ001-0002|an "open quote|an "open quote\n')
    for name, seconds in (("LJ001-0001", 1), ("LJ001-0002", 2)):
        sf.write(lj / "wavs" / f"{name}.wav", noise(seconds), RATE)
    chapter = tmp_path / "LibriTTS" / "dev-clean" / "84" / "121123"
    chapter.mkdir(parents=True)
    sf.write(chapter / "84_121123_000007_000001.wav", noise(1), 24_000)
    (chapter / "84_121123_000007_000001.normalized.txt").write_text("Maximilian smiled.")
    (chapter / "84_121123_000007_000001.original.txt").write_text("Maximilian smiled (1.).")
    prepare.main(["ljspeech", str(tmp_path), "--out", str(tmp_path / "lj")])
    prepare.main(["libritts", str(tmp_path), "--subset", "dev-clean", "--out", str(tmp_path / "lt")])
    spoken = load_sentences(tmp_path / "lj")
    assert [(s.text, s.voice, s.seconds) for s in spoken] == [
        ('Printing, in "fourteen forty",', "lj", 1.0), ('an "open quote', "lj", 2.0)]
    [voice] = load_folder(tmp_path / "lt", max_seconds=0)
    assert (voice.text, voice.voice) == ("Maximilian smiled.", "84") and abs(voice.seconds - 2 / 3) < 0.01
    (lj / "wavs" / "LJ001-0002.wav").unlink()
    assert "LJ001-0002.wav: no such file" in failure("ljspeech", tmp_path, "--out", tmp_path / "other")


def test_an_incomplete_corpus_is_named(libri, tmp_path):
    given = ["librispeech", libri, "--subset", "test-clean", "--out", tmp_path / "ls"]
    chapter = libri / "LibriSpeech" / "test-clean" / "61" / "70968"
    (chapter / "61-70968-0001.flac").rename(tmp_path / "away.flac")
    assert "no audio for 61-70968-0001" in failure(*given)
    (tmp_path / "away.flac").rename(chapter / "61-70968-0001.flac")
    (chapter / "61-70968.trans.txt").write_text("61-70968-0001 HALF\n")
    assert "61-70968-0000" in failure(*given)
    (chapter / "61-70968.trans.txt").unlink()
    assert "61-70968.trans.txt" in failure(*given)
    (libri / "LibriSpeech" / "dev-clean").mkdir()
    assert "no audio in it" in failure("librispeech", libri, "--subset", "dev-clean", "--out", tmp_path / "ls")
    assert "ROOT is what holds LibriSpeech/" in failure(
        "librispeech", libri, "--subset", "test-other", "--out", tmp_path / "ls")
    assert "LJSpeech-1.1: no such folder" in failure("ljspeech", libri, "--out", tmp_path / "ls")
    assert not (tmp_path / "ls").exists()


def test_a_data_set_is_never_written_over(libri, tmp_path):
    given = ["librispeech", libri, "--subset", "test-clean", "--out", tmp_path / "ls"]
    prepare.main([str(a) for a in given])
    before = (tmp_path / "ls" / "metadata.jsonl").read_text(encoding="utf-8")
    assert "holds a data set already" in failure(*given)
    assert "holds a data set already" in failure("select", "random", tmp_path / "ls", "--out", tmp_path / "ls")
    assert (tmp_path / "ls" / "metadata.jsonl").read_text(encoding="utf-8") == before


# ---- flags and pools -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, message", [
    (["librispeech", "x", "--subset", "test-cleen", "--out", "y"], "invalid choice: 'test-cleen'"),
    (["select", "best", "x", "--out", "y"], "invalid choice: 'best'"),
    (["select", "random", "x", "--out", "y", "--count", "0"], "--count must be 1 or more")])
def test_a_typing_error_names_itself(flags, message, capsys):
    with pytest.raises(SystemExit):
        prepare.main(flags)
    assert message in capsys.readouterr().err


# ---- pools -------------------------------------------------------------------------------------------------

@pytest.fixture
def pool(tmp_path):
    """Six clips of 1 to 6 s, in no order; clip K says K keywords."""
    folder = tmp_path / "pool"
    (folder / "audio").mkdir(parents=True)
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as out:
        for k in (3, 1, 6, 2, 5, 4):
            sf.write(folder / "audio" / f"{k}.wav", noise(k), RATE)
            row = {"file_name": f"audio/{k}.wav", "text": " ".join(["now", *["Anna"] * (k - 1), "and", "lima"]),
                   "keywords": ["anna", "lima", "oslo"], "voice": "low" if k < 4 else "high", "snr_db": k}
            out.write(json.dumps(row) + "\n")
    return folder


def chosen(pool, kind, *flags):
    """The clips, by their seconds, in the order of the new folder."""
    out = pool.parent / "out"
    (out / "metadata.jsonl").unlink(missing_ok=True)
    prepare.main(["select", kind, str(pool), "--out", str(out), *flags])
    return [round(u.seconds) for u in load_folder(out)]


def test_random_is_seeded_and_keeps_rows_and_order(pool):
    some = chosen(pool, "random", "--count", "3")
    assert len(set(some)) == 3 and some == [k for k in (3, 1, 6, 2, 5, 4) if k in some]
    [row, *_] = rows_of(pool.parent / "out")
    assert row["snr_db"] == some[0] and set(row) == {"file_name", "text", "keywords", "voice", "snr_db"}
    assert chosen(pool, "random", "--count", "3") == some
    assert len({tuple(chosen(pool, "random", "--count", "3", "--seed", str(s))) for s in range(6)}) > 2
    assert chosen(pool, "random") == [3, 1, 6, 2, 5, 4]


def test_length_by_half_and_by_seconds(pool, capsys):
    assert chosen(pool, "length", "--half", "short") == [3, 1, 2]
    assert chosen(pool, "length", "--half", "long") == [6, 5, 4]
    assert chosen(pool, "length", "--min-seconds", "2", "--max-seconds", "4") == [3, 2, 4]
    assert chosen(pool, "length", "--half", "long", "--max-seconds", "5", "--count", "9") == [5, 4]
    said = capsys.readouterr().out
    assert "2 of 6 clips fit; fewer than --count 9: all are taken" in said and "2 of 6 clips of" in said
    assert "none of its 6 clips" in failure("select", "length", pool, "--out", pool.parent / "no", "--min-seconds", 60)


def test_keywords_are_counted_as_they_are_said(pool):
    assert chosen(pool, "keywords") == [3, 6, 5, 4]             # "oslo" is on every list and never said
    assert chosen(pool, "keywords", "--least", "6") == [6]


def test_one_clip_of_each_voice(pool):
    drawn = [chosen(pool, "random", "--one-per-voice", "--seed", str(seed)) for seed in range(6)]
    assert all(sorted(k < 4 for k in ks) == [False, True] for ks in drawn) and len(set(map(tuple, drawn))) > 2
    assert len(chosen(pool, "random", "--one-per-voice", "--count", "1")) == 1


def test_a_bad_line_of_the_pool_is_named(pool):
    with open(pool / "metadata.jsonl", "a", encoding="utf-8") as out:
        out.write('{"file_name": "audio/7.wav", "text": "x"}\n')
    assert "metadata.jsonl:7:" in failure("select", "random", pool, "--out", pool.parent / "no")
    assert len(chosen(pool, "random", "--skip-bad")) == 6
    assert "no metadata.jsonl" in failure("select", "random", pool / "audio", "--out", pool.parent / "no")


class Planted:
    """Judges whose transcripts are known: `heard` by model and the seconds of the clip."""

    rate, asked, fail_at, table, on_disk = RATE, 0, None, None, None
    heard = {"a": {1: "now lima and", 2: "now anna and", 3: "now anna anna and lima", 4: "no", 5: "no", 6: None},
             "b": {1: "now lima and", 2: "now anna and lima", 3: "now anna", 4: "NO.", 5: "x", 6: "x"}}

    def __init__(self, name, device, language, flag):
        self.name = name

    def transcribe(self, waves, batch):
        Planted.asked += len(waves)
        if Planted.asked == Planted.fail_at:
            Planted.on_disk = Planted.table.read_text(encoding="utf-8")         # what a power cut would leave
            raise KeyboardInterrupt
        return [self.heard[self.name][len(wave) // RATE] for wave in waves]


@pytest.fixture
def planted(monkeypatch):
    monkeypatch.setattr(prepare, "Judge", Planted)
    monkeypatch.setattr(Planted, "asked", 0)
    return ["--model", "a", "--second-model", "b"]


def test_disagreement_by_hand(pool, planted, capsys):
    # 1: both the same mistake; 2: a wrong, b right; 3: a right, b wrong; 4: the same, but for case and punctuation; 5:
    # both wrong, differently; 6: a failed
    assert chosen(pool, "disagreement", *planted) == [3, 2, 5]
    assert "(3 heard differently, 0 with long repetitions, 1 that" in capsys.readouterr().out
    assert chosen(pool, "disagreement", *planted) == [3, 2, 5]
    assert Planted.asked == 12                                  # the transcripts were kept: nothing is heard twice
    assert "must not be --model" in failure(
        "select", "disagreement", pool, "--out", pool.parent / "no", "--model", "a", "--second-model", "a")


def test_transcripts_survive_a_stop(pool, planted, monkeypatch):
    table = pool.parent / "out" / "transcripts.jsonl"
    monkeypatch.setattr(Planted, "fail_at", 9)
    monkeypatch.setattr(Planted, "table", table)
    with pytest.raises(SystemExit, match="^stopped; the same command goes on"):
        chosen(pool, "disagreement", *planted, "--batch", "1")
    assert table.read_text(encoding="utf-8") == Planted.on_disk and len(Planted.on_disk.splitlines()) == 8
    assert not (pool.parent / "out" / "metadata.jsonl").exists()
    table.write_text(Planted.on_disk[:-20])                     # or one in the middle of a line
    monkeypatch.setattr(Planted, "fail_at", None)
    monkeypatch.setattr(Planted, "asked", 0)
    assert chosen(pool, "disagreement", *planted) == [3, 2, 5] and Planted.asked == 12 - 7


def test_the_embedded_recognisers_choose_d1(tmp_path, capsys):
    """Of clips of d1, which was chosen in this way, and of a voice that both know, those of d1 are chosen."""
    rows = [{**row, "file_name": str(Path(f"data/{name}/{row['file_name']}").resolve())}
            for name, chosen in (("d1", range(6)), ("test/open", (15, 18, 20, 23, 28, 36)))     # which both read well
            for row in [rows_of(Path("data") / name)[i] for i in chosen]]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    kept = len(CACHE)
    given = ["--model", "checkpoints/asr", "--second-model", "checkpoints/asr2", "--device", "cpu"]
    prepare.main(["select", "disagreement", str(tmp_path), "--out", str(tmp_path / "out"), *given])
    assert [row["text"] for row in rows_of(tmp_path / "out")] == [row["text"] for row in rows[:6]]
    assert len(CACHE) == kept                                     # a large corpus would fill the memory
