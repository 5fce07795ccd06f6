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
import hashlib
import json
import re
import sys
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from engine.audio import DataError, is_pointer, read_audio
from engine.text import by_character, normalize_text

EMBEDDED = Path(__file__).resolve().parent / "data"
POOLS = ("d0", "d1", "d2_long", "d2_short", "d3", "tts/train.jsonl")      # to train on
TESTS = ("short", "long", "keywords", "noise", "open")    # of the embedded test sets, in the order of the table
SPOKEN = ("plain", "hard")                                # those of chapters 2 and 3
FASTEST = 7, 14     # words, or characters, a second: no one speaks so fast


@dataclass(frozen=True)
class Utterance:
    """One line of a metadata.jsonl whose audio was read and found good."""

    path: Path
    text: str
    keywords: tuple = ()
    voice: str = ""
    seconds: float = 0.0
    listed: tuple | None = None  # the keyword list of its prompt, words among them that are not said
    sound: str = ""              # a digest of its samples: the same recording under another name has the same

    def waveform(self, rate):
        """float32 (samples,) at `rate` Hz, mono."""
        return read_audio(self.path, rate)


# ---- metadata ----------------------------------------------------------------------------------------------

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
    if re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False)):
        raise DataError("holds half a character (a lone surrogate)")
    for key in strings:
        if not isinstance(row.get(key), str) or (key == "file_name" and not row[key]):
            raise DataError(f'needs "{key}" as a string; it has {", ".join(row)[:80] or "nothing"}')
    return row


def listed(row, key, kind):
    """The list `row[key]` as a tuple, () where there is none. Raises DataError unless every member is a `kind`."""
    value = row.get(key)
    if value is not None and (not isinstance(value, list) or any(type(member) is not kind for member in value)):
        raise DataError(f'"{key}" must be a list of {"strings" if kind is str else "whole numbers"}')
    return tuple(value or ())


def voice_of(row):
    """The name in row["voice"], "" where there is none; a number is a name too."""
    voice = row.get("voice")
    if voice is None or isinstance(voice, str | int) and not isinstance(voice, bool):
        return "" if voice is None else str(voice)
    raise DataError('"voice" must be a string')


def read_line(folder, line, rate, max_seconds):
    """One line of metadata -> Utterance. Raises DataError without the line number, which the caller knows."""
    row = parse_row(line, "file_name", "text")
    path, keywords, voice = folder / row["file_name"], listed(row, "keywords", str), voice_of(row)
    wave = read_audio(path, rate)
    seconds = len(wave) / rate
    if max_seconds and seconds > max_seconds:
        raise DataError(f"{path}: {seconds:.7g} s long, over --max-seconds {max_seconds:g}")
    return Utterance(path, row["text"], keywords, voice, seconds, sound=hashlib.sha1(wave.data).hexdigest())


def load_folder(folder, rate=16_000, max_seconds=30.0, skip_bad=False):
    """Every utterance of `folder`, decoded once so that no bad file can stop a run later on.

    The first bad line raises DataError with file and line number; with `skip_bad` each is printed, left out and
    counted. `max_seconds` 0 = no limit.
    """
    folder = Path(folder)
    table = folder / "metadata.jsonl"
    if not table.is_file():
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder" + (not folder.is_absolute()) * f" in {Path.cwd()}")
        others = "".join(f", but {p.name}" for p in sorted(folder.glob("metadata.*")))
        raise DataError(f"{folder}: the folder has no metadata.jsonl{others}; see data.py for the form of a data set")
    return read_lines(table, lambda line: read_line(folder, line, rate, max_seconds), skip_bad)


def read_lines(table, read, skip_bad=False):
    """`read(line)` of every line that is not empty; a bad one is named with its number, and skipped if so asked."""
    found, bad = [], 0
    try:
        lines = Path(table).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{table}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if is_pointer(table):
        raise DataError(f"{table}: {is_pointer(table)}")
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
    """Texts to be spoken: a plain text file, .txt, with one a line, or a metadata.jsonl or its folder ("text" is
    needed; "voice", "file_name", a recording, and "tokens", its speech tokens, are used where they are given)."""
    path = Path(path)
    table = path / "metadata.jsonl" if path.is_dir() else path
    if not table.is_file():
        raise DataError(f"{path}: no such file, and no folder with a metadata.jsonl")
    plain = table.suffix.lower() == ".txt"
    if not plain and table.suffix.lower() != ".jsonl":
        raise DataError(f"{path}: texts are read from .txt, one a line, or .jsonl, not "
                        f"{table.suffix or 'without a suffix'}: convert or rename it")

    def read(line):
        row = {"text": plain_text(line)} if plain else parse_row(line, "text")
        if not any(c.isalnum() for c in row["text"]):
            raise DataError("no word in it that could be said")
        name, seconds = row.get("file_name"), 0.0
        if name is not None:
            parse_row(line, "file_name")
            seconds = len(read_audio(table.parent / name, 16_000)) / 16_000
        codes = listed(row, "tokens", int)
        if codes and min(codes) < 0:
            raise DataError('"tokens" must be a list of whole numbers from 0')
        return Sentence(" ".join(row["text"].split()), voice_of(row), seconds, codes)

    return read_lines(table, read, skip_bad)


TABLE_ROW = re.compile(r"""\t | \|                                     # columns
    | ^"[^"]*"[,;] | [,;]"[^"]*"(?:[,;]|$) | ^\d+[,;](?!\d{3}\b)\S         # quoted cells, a number before the text
    | \.(?:wav|flac|ogg|mp3|opus|m4a)\b""", re.X | re.I)


def plain_text(line):
    """A line of a .txt. Raises DataError where it is a line of something else, whose markup would be spoken."""
    line = line.strip()
    try:
        is_json = line[0] in "[{" and isinstance(json.loads(line), dict | list)
    except (ValueError, RecursionError):
        is_json = False
    cells = re.split("[,;]", line.lower())
    header = len(cells) > 1 and {"text", "sentence", "transcript", "transcription"} & set(cells)
    if is_json:
        raise DataError("JSON in a .txt; name the file .jsonl")
    if header or TABLE_ROW.search(line):
        raise DataError("a row of a table in a .txt; give one text a line, or a metadata.jsonl")
    if re.search(r"</?[A-Za-z][^<>]*>|-->", line):
        raise DataError("markup in a .txt, which would be spoken; give one plain text a line")
    return line


# ---- what is trained on, and what is tested on -------------------------------------------------------------

def are_ours(paths):
    """Whether all of `paths` are embedded pools, known by name: those have test sets of their own."""
    return {Path(path).resolve() for path in paths} <= {(EMBEDDED / name).resolve() for name in POOLS}


def hold_out(items, most, args, what):
    """(items left, a tenth of them, at most `most`). What says the same is held together: a voice more that says a
    sentence is no new sentence."""
    order = np.random.default_rng(args.seed).permutation(len(items))
    texts = [normalize_text(item.text, args.language) or i for i, item in enumerate(items)]
    rank = {}
    for i in order:
        rank.setdefault(texts[i], len(rank))
    order = sorted(order, key=lambda i: rank[texts[i]])
    held = min(most, max(1, len(items) // 10))
    print(f"{what}: {held} of {len(items)} lines of --data are held out")
    return [items[i] for i in order[held:]], [items[i] for i in order[:held]]


def leave_out(items, tests, args):
    """The items that are not in `tests` too: no recording of theirs, by path or by sound, and no text. Says how many
    are left out, and raises DataError where fewer than --batch are left."""
    def marks(item):
        return {"file": getattr(item, "path", None) and item.path.resolve(), "sound": getattr(item, "sound", None),
                "text": normalize_text(item.text, args.language)}

    known = {(what, mark) for item in tests for what, mark in marks(item).items() if mark}
    found = [next((what for what, mark in marks(item).items() if (what, mark) in known), None) for item in items]
    counts, kept = Counter(filter(None, found)), [item for item, what in zip(items, found) if not what]
    if counts:
        print(f"{counts.total()} lines of --data are in --dev or --test too: left out of the training ("
              + ", ".join(f"{number} by {what}" for what, number in counts.items()) + ")")
    if len(kept) < args.batch:
        given = "--test" if args.test else "--dev" if args.dev else ""
        why = f", and {given} holds the same" if counts and given else ", the rest says the same as what is held out"
        raise DataError(f"{len(kept)} of {len(items)} lines of --data to train on, fewer than --batch {args.batch}"
                        f"{why if counts else ''}")
    return kept


def warn_of_haste(clips, args):
    """Says how many recordings hold more text than anyone can say in their time: cut short, or of another text."""
    most = FASTEST[by_character(args.language)]
    fast = [c for c in clips if len(normalize_text(c.text, args.language).split()) > most * max(c.seconds, 1)]
    if fast:
        print(f"{len(fast)} of {len(clips)} recordings say more than {most} tokens a second: cut short, or of another "
              f'text? The first: "{fast[0].text[:60]}"')


def split_texts(args):
    """(sentences of --data, those that choose the best adapter, {name: sentences to test on}), as `split_clips`."""
    texts, dev, tests = split(args, lambda path: load_sentences(path, args.skip_bad), EMBEDDED / "tts", SPOKEN)
    warn_of_haste([s for part in (texts, dev, *tests.values()) for s in part if s.seconds], args)
    return texts, dev, tests


def split(args, read, ours, names):
    """(items of --data, of --dev, {name: items of --test}), what is in the last two left out of the first.

    Without --dev and --test: the embedded ones, `ours`/dev and `ours`/test; where --data is the user's own, a tenth of
    it each (at most 100).
    """
    train, tests, embedded = [item for path in args.data for item in read(path)], None, are_ours(args.data)
    if args.test or embedded:
        paths = [Path(path) for path in args.test or [ours / "test" / name for name in names]]
        tests = {path.resolve().name: read(path) for path in paths}
        if len(tests) < len(paths):
            raise DataError("--test: two of the same name; the table could not tell them apart")
    dev = read(args.dev or ours / "dev") if args.dev or embedded else None
    if tests is None:
        train, held = hold_out(train, 100, args, "no --test")
        tests = {"held-out": held}
    if dev is None:
        train, dev = hold_out(train, 100, args, "no --dev")
    return leave_out(train, [item for part in (dev, *tests.values()) for item in part], args), dev, tests


def with_lists(utterances, pool, count, args):
    """The utterances with keyword lists for their prompts: their own and `count` others of `pool` that are not said, in
    random order, a function of the seed and the file alone. Without such distractors a list gives the answer away and
    a keyword reward has nothing to teach (arXiv 2512.21828)."""
    pool, found = {k: normalize_text(k, args.language) for k in sorted(pool)}, []
    names, widths = list(pool), {len(k.split()) for k in pool.values()}
    for u in utterances:
        rng = np.random.default_rng([args.seed, zlib.crc32(str(u.path.name).encode()), zlib.crc32(u.text.encode())])
        said = normalize_text(u.text, args.language).split()
        grams = {" ".join(said[i:i + n]) for n in widths for i in range(len(said) - n + 1)}
        enough = min(len(names), count + len(grams) + len(u.keywords))          # of which that many may be said
        drawn = [names[i] for i in rng.choice(len(names), size=enough, replace=False)]
        words = [*u.keywords, *[k for k in drawn if k not in u.keywords and pool[k] not in grams][:count]]
        found.append(replace(u, listed=tuple(words[i] for i in rng.permutation(len(words)))))
    return found


def split_clips(args, rate):
    """(utterances of --data, those that choose the best adapter, {name: utterances of --test}), as `split`; the first
    of --test in which something is said leads the report."""
    train, dev, tests = split(args, lambda folder: load_folder(folder, rate, args.max_seconds, args.skip_bad), EMBEDDED,
                              TESTS)
    warn_of_haste([*train, *dev, *(u for test in tests.values() for u in test)], args)
    if args.hotwords is not None:
        pool = {k for u in train for k in u.keywords}
        if not pool:
            raise DataError("--hotwords needs keywords, and --data has none in its metadata.jsonl")
        train, dev = (with_lists(part, pool, args.hotwords, args) for part in (train, dev))
        tests = {name: with_lists(test, pool, args.hotwords, args) for name, test in tests.items()}
    spoken = {name: any(normalize_text(u.text, args.language) for u in test) for name, test in tests.items()}
    if not any(spoken.values()) or not any(normalize_text(u.text, args.language) for u in dev):
        raise DataError(f"{'--dev' if any(spoken.values()) else '--test'}: nothing is said in it, and WER needs words")
    return train, dev, dict(sorted(tests.items(), key=lambda test: not spoken[test[0]]))


@functools.lru_cache(maxsize=2)
def epoch_order(epoch, count, seed):
    """The order in which one epoch visits its `count` utterances."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def batch_indices(step, count, batch, seed):
    """The `batch` indices below `count` that step `step` trains on: every epoch in a new order, nothing left out.

    A function of its arguments alone, so that a resumed run draws what the unbroken one would have drawn.
    """
    return [int(epoch_order(at // count, count, seed)[at % count]) for at in range(step * batch, (step + 1) * batch)]
