"""Data: audio folders in, batches out.

A data set is a folder with `metadata.jsonl`, one JSON object a line, and the audio that it names (the AudioFolder
form): {"file_name": "audio/0001.ogg", "text": "...", "keywords": ["anna"]}. Any rate, mono or stereo, whatever
soundfile reads (wav, flac, ogg, mp3).

    load_folder(folder)        checked utterances, or one clear line that says what is wrong and where
    load_sentences(path)       texts to be spoken, from a plain text file or a metadata.jsonl
    split_clips, split_texts   what chapter 1, and what chapters 2 and 3, train and test on
    batch_indices(step, ...)   which of them a step trains on: a function of the seed and the step alone
"""
import functools
import json
import os
import sys
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
import torchaudio
from tqdm import tqdm

from rewards import normalize_text

EMBEDDED = Path(__file__).resolve().parent / "data"
TESTS = ("short", "long", "keywords", "noise", "source")  # of the embedded test sets, in the order of the table
SHORTEST = 0.1  # seconds; a shorter clip has hardly a frame of features


class DataError(ValueError):
    """Something in a user's data or arguments is wrong: one line that says what, where and how to mend it."""


@dataclass(frozen=True)
class Utterance:
    """One line of a metadata.jsonl whose audio was read and found good."""

    path: Path
    text: str
    keywords: tuple = ()
    voice: str = ""
    snr_db: float | None = None
    seconds: float = 0.0
    listed: tuple | None = None  # the keyword list of its prompt, words among them that are not said

    def waveform(self, rate):
        """float32 (samples,) at `rate` Hz, mono."""
        return read_audio(self.path, rate)


@functools.lru_cache(maxsize=4096)
def read_audio(path, rate):
    """The file as a mono float32 array (samples,) at `rate` Hz. Raises DataError for anything but sound."""
    if not os.path.exists(path):  # Path.exists raises for a name that is too long
        raise DataError(f"{path}: no such file")
    try:
        wave, original = sf.read(path, dtype="float32", always_2d=True)     # (samples, channels)
    except (sf.LibsndfileError, OSError, TypeError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as audio ({error})") from None
    wave = wave.mean(axis=1)
    if not np.isfinite(wave).all():
        raise DataError(f"{path}: holds {int((~np.isfinite(wave)).sum())} samples that are not numbers")
    if len(wave) < SHORTEST * original:
        raise DataError(f"{path}: {len(wave) / original:.2f} s long, under the least of {SHORTEST} s")
    if original != rate:
        wave = torchaudio.functional.resample(torch.from_numpy(wave), original, rate).numpy()
    return wave


def parse_row(line, *strings):
    """One line of metadata -> dict whose keys `strings` hold text. Raises DataError without the line number."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON that can be read ({str(error)[:80]})") from None
    if not isinstance(row, dict):
        raise DataError("not a JSON object")
    for key in strings:
        if not isinstance(row.get(key), str) or (key == "file_name" and not row[key]):
            raise DataError(f'needs "{key}" as a string')
        if any("\ud800" <= c <= "\udfff" for c in row[key]):
            raise DataError(f'"{key}" holds half a character (a lone surrogate)')
    return row


def read_line(folder, line, rate, max_seconds):
    """One line of metadata -> Utterance. Raises DataError without the line number, which the caller knows."""
    row = parse_row(line, "file_name", "text")
    keywords = row.get("keywords") or []
    if not isinstance(keywords, list) or not all(isinstance(k, str) for k in keywords):
        raise DataError('"keywords" must be a list of strings')
    wave = read_audio(folder / row["file_name"], rate)
    seconds = len(wave) / rate
    if max_seconds and seconds > max_seconds:
        raise DataError(f"{folder / row['file_name']}: {seconds:.1f} s long, over --max-seconds {max_seconds:g}")
    return Utterance(folder / row["file_name"], row["text"], tuple(keywords), str(row.get("voice") or ""),
                     row.get("snr_db"), seconds)


def load_folder(folder, rate=16_000, max_seconds=30.0, skip_bad=False):
    """Every utterance of `folder`, decoded once so that no bad file can stop a run later on.

    The first bad line raises DataError with file and line number; with `skip_bad` each is printed, left out and
    counted. `max_seconds` 0 = no limit.
    """
    folder = Path(folder)
    table = folder / "metadata.jsonl"
    if not table.is_file():
        what = "no such folder" if not folder.is_dir() else "the folder has no metadata.jsonl"
        raise DataError(f"{folder}: {what}; see data.py for the form of a data set")
    return read_lines(table, lambda line: read_line(folder, line, rate, max_seconds), skip_bad)


def read_lines(table, read, skip_bad=False):
    """`read(line)` of every line that is not empty; a bad one is named with its number, and skipped if so asked."""
    found, bad = [], 0
    try:
        lines = Path(table).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{table}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    for number, line in enumerate(tqdm(lines, desc=f"read {table}", leave=False, disable=None), 1):
        if not line.strip():
            continue
        try:
            found.append(read(line))
        except DataError as error:
            if not skip_bad:
                raise DataError(f"{table}:{number}: {error} (mend it, or leave it out with --skip-bad)") from None
            bad += 1
            print(f"skipped {table}:{number}: {error}", file=sys.stderr)
    if bad:
        print(f"{table}: {bad} of {bad + len(found)} lines skipped", file=sys.stderr)
    if not found:
        raise DataError(f"{table}: nothing usable in it")
    return found


@dataclass(frozen=True)
class Sentence:
    """A text to be spoken; `seconds` of its recording and its speech tokens where there are such."""

    text: str
    voice: str = ""
    seconds: float = 0.0
    codes: tuple = ()


def load_sentences(path, skip_bad=False):
    """Texts to be spoken: a plain text file with one a line, or a metadata.jsonl or its folder ("text" is needed;
    "voice", "file_name", a recording, and "tokens", its speech tokens, are used where they are given)."""
    path = Path(path)
    table = path / "metadata.jsonl" if path.is_dir() else path
    if not table.is_file():
        raise DataError(f"{path}: no such file, and no folder with a metadata.jsonl")

    def read(line):
        if table.suffix != ".jsonl":
            row = {"text": line}
        else:
            row = parse_row(line, "text")
        if not any(c.isalnum() for c in row["text"]):
            raise DataError("no word in it that could be said")
        name, seconds = row.get("file_name"), 0.0
        if name:
            parse_row(line, "file_name")
            seconds = len(read_audio(table.parent / name, 16_000)) / 16_000
        codes = row.get("tokens") or []
        if not isinstance(codes, list) or not all(type(c) is int and c >= 0 for c in codes):
            raise DataError('"tokens" must be a list of whole numbers')
        return Sentence(" ".join(row["text"].split()), str(row.get("voice") or ""), seconds, tuple(codes))

    return read_lines(table, read, skip_bad)


def split_texts(args):
    """(sentences of --data, sentences of --test). Without --test: the embedded test texts; where --data is the user's
    own, a tenth of it (at most 100). A text of both is left out of the training."""
    texts = [s for path in args.data for s in load_sentences(path, args.skip_bad)]
    if args.test or all(Path(path).resolve().is_relative_to(EMBEDDED) for path in args.data):
        tests = load_sentences(args.test or EMBEDDED / "tts" / "test", args.skip_bad)
    else:
        order = np.random.default_rng(args.seed).permutation(len(texts))
        held = min(100, max(1, len(texts) // 10))
        tests, texts = [texts[i] for i in order[:held]], [texts[i] for i in order[held:]]
        print(f"no --test given: {held} texts of --data are held out as the test set")
    known = {normalize_text(s.text, args.language) for s in tests}
    kept = [s for s in texts if normalize_text(s.text, args.language) not in known]
    if len(kept) < len(texts):
        print(f"{len(texts) - len(kept)} texts of --data are in the test set too: left out of the training")
    texts = kept
    if len(texts) < args.batch:
        raise DataError(f"{len(texts)} texts to train on, fewer than --batch {args.batch}")
    return texts, tests


def with_lists(utterances, pool, count, seed):
    """The utterances with keyword lists for their prompts: their own and `count` others of `pool` that are not said, in
    random order, a function of the seed and the file alone. Without such distractors a list gives the answer away and
    a keyword reward has nothing to teach (arXiv 2512.21828)."""
    pool, found = sorted(set(pool)), []
    for u in utterances:
        rng = np.random.default_rng([seed, zlib.crc32(str(u.path.name).encode()), zlib.crc32(u.text.encode())])
        said = f" {normalize_text(u.text)} "
        others = [k for k in pool if k not in u.keywords and f" {normalize_text(k)} " not in said]
        drawn = rng.choice(len(others), size=min(count, len(others)), replace=False)
        words = [*u.keywords, *(others[i] for i in drawn)]
        found.append(replace(u, listed=tuple(words[i] for i in rng.permutation(len(words)))))
    return found


def split_clips(args, rate):
    """(utterances of --data, {name: utterances} of --test, the name of the set that chooses the best adapter).

    Without --test: the embedded test sets; where --data is the user's own, a tenth of it (at most 200) is held out.
    The first set in which something is said chooses.
    """
    def read(folder):
        return load_folder(folder, rate, args.max_seconds, args.skip_bad)

    train = [u for folder in args.data for u in read(folder)]
    if args.test or all(Path(folder).resolve().is_relative_to(EMBEDDED) for folder in args.data):
        folders = [Path(folder) for folder in args.test or [EMBEDDED / "test" / name for name in TESTS]]
        tests = {folder.resolve().name: read(folder) for folder in folders}
        if len(tests) < len(folders):
            raise DataError("--test: two folders of the same name; the table could not tell them apart")
    else:
        order = np.random.default_rng(args.seed).permutation(len(train))
        held = min(200, max(1, len(train) // 10))
        tests, train = {"held-out": [train[i] for i in order[:held]]}, [train[i] for i in order[held:]]
        print(f"no --test given: {held} utterances of --data are held out as the test set")
    if len(train) < args.batch:
        raise DataError(f"{len(train)} utterances to train on, fewer than --batch {args.batch}")
    if args.hotwords is not None:
        pool = {k for u in train for k in u.keywords}
        if not pool:
            raise DataError("--hotwords needs keywords, and --data has none in its metadata.jsonl")
        train = with_lists(train, pool, args.hotwords, args.seed)
        tests = {name: with_lists(test, pool, args.hotwords, args.seed) for name, test in tests.items()}
    spoken = [name for name in tests if any(normalize_text(u.text, args.language) for u in tests[name])]
    if not spoken:
        raise DataError("no test set with words in it: the best adapter is chosen by WER, which needs some")
    return train, tests, spoken[0]


@functools.lru_cache(maxsize=2)
def epoch_order(epoch, count, seed):
    """The order in which one epoch visits its `count` utterances."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def batch_indices(step, count, batch, seed):
    """The `batch` indices below `count` that step `step` trains on: every epoch in a new order, nothing left out.

    A function of its arguments alone, so that a resumed run draws what the unbroken one would have drawn.
    """
    return [int(epoch_order(at // count, count, seed)[at % count]) for at in range(step * batch, (step + 1) * batch)]
