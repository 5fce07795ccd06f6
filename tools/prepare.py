"""Published corpora, and pools chosen from any data set, as data folders of this repository.

    python -m tools.prepare librispeech ROOT --subset train-clean-100 --out ls [--biasing FILE_OR_DIR]
    python -m tools.prepare ljspeech ROOT --out lj
    python -m tools.prepare libritts ROOT --subset dev-clean --out lt

    python -m tools.prepare select random ls --out d0 --count 400                                      D0, the control
    python -m tools.prepare select disagreement ls --out d1 --model MODEL --second-model OTHER         D1
    python -m tools.prepare select length ls --out d2 --half long                                      D2
    python -m tools.prepare select keywords ls --out d3 --least 3                                      D3
    python -m tools.prepare select random lt --out voices --count 5 --one-per-voice      for grpo_tts.py --voices

Each writes OUT/metadata.jsonl, in the form that data.py describes. No audio is copied: "file_name" is the absolute path
of the corpus' own file, which data.load_folder reads like any other. ROOT is the folder that holds LibriSpeech/,
LJSpeech-1.1/ or LibriTTS/, as the archives of openslr.org and keithito.com unpack, or as torchaudio.datasets fetches
them. Texts of LibriSpeech are lower-cased, those of the other two are the corpus' normalised ones.

--biasing gives LibriSpeech its keywords, the rare words that are said: a list of words, one a line, as torchaudio's
LibriSpeechBiasing takes it; or a table of facebookresearch/fbai-speech, is21_deep_bias/ref/SUBSET.biasing_N.tsv, whose
third column lists them for each utterance; or the folder of either.

D0 to D3 are the pools of arXiv 2509.18569. Who is eligible: all (random); clips that the two recognisers hear
differently, or in whose transcripts a word stands three times in a row or a pair of words twice (disagreement; what a
long repetition is, is our choice); a range of seconds, in the paper 20 and more, or the shorter or longer half where a
corpus has none so long (length); with --least keywords said (keywords). --count of them are drawn at random, all
without it.
"""
import argparse

from engine.settings import check_language

SUBSETS = "dev-clean dev-other test-clean test-other train-clean-100 train-clean-360 train-other-500".split()


def parse_args(argv=None):
    """What to make and of what."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    corpora = p.add_subparsers(dest="command", required=True, metavar="librispeech|ljspeech|libritts|select")
    for name in ("librispeech", "ljspeech", "libritts"):
        c = corpora.add_parser(name, help=f"a data folder of {name}")
        c.add_argument("root", metavar="ROOT", help="the folder that holds the corpus' own")
        c.add_argument("--out", required=True, metavar="DIR", help="the data folder to write")
        if name != "ljspeech":
            c.add_argument("--subset", required=True, choices=SUBSETS, metavar="NAME", help=", ".join(SUBSETS))
        if name == "librispeech":
            c.add_argument("--biasing", metavar="FILE_OR_DIR", help="rare words, the keywords (default: none)")
    kinds = corpora.add_parser("select", help="a pool chosen from a data folder").add_subparsers(
        dest="kind", required=True, metavar="random|disagreement|length|keywords")
    for kind in ("random", "disagreement", "length", "keywords"):
        c = kinds.add_parser(kind)
        c.add_argument("folder", metavar="DIR", help="the data folder to choose from")
        c.add_argument("--out", required=True, metavar="DIR2", help="the data folder to write")
        c.add_argument("--count", type=int, metavar="N", help="clips to draw of those eligible (default: all)")
        c.add_argument("--seed", type=int, default=1, help="of the draw (default: 1)")
        c.add_argument("--one-per-voice", action="store_true", help="at most one clip of each voice")
        c.add_argument("--language", default="en", help="of the texts (default: en)")
        c.add_argument("--skip-bad", action="store_true", help="leave out and count bad lines of the data")
        if kind == "disagreement":
            c.add_argument("--model", required=True, help="the recogniser to be trained, folder or hub id")
            c.add_argument("--second-model", required=True, help="another recogniser")
            c.add_argument("--batch", type=int, default=32, help="clips at once (default: 32)")
            c.add_argument("--device", default="auto", help="auto = cuda where there is one, else cpu")
        if kind == "length":
            c.add_argument("--half", choices=["short", "long"], help="the shorter or the longer half of the clips")
            c.add_argument("--min-seconds", type=float, default=0, help="shortest clip (default: 0)")
            c.add_argument("--max-seconds", type=float, default=float("inf"), help="longest clip (default: any)")
        if kind == "keywords":
            c.add_argument("--least", type=int, default=3, help="keywords said in a clip, repeats counted (default: 3)")
    args = p.parse_args(argv)
    for name, least in dict(count=1, batch=1, least=1, seed=0).items():
        if getattr(args, name, None) is not None and getattr(args, name) < least:
            p.error(f"--{name} must be {least} or more, not {getattr(args, name)}")
    check_language(p, getattr(args, "language", None))
    return args


if __name__ == "__main__":
    parse_args()  # --help and typing errors answer at once, before torch loads

import contextlib
import csv
import json
import sys
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
from torchaudio.datasets import LIBRISPEECH, LIBRITTS, LJSPEECH, LibriSpeechBiasing
from tqdm import tqdm

from data import listed, parse_row, read_lines, voice_of
from engine.audio import DataError, decode_audio, missing
from engine.judges import Judge
from engine.log import as_line, read_rows, replace_file
from engine.run import pick_device, quiet, same_model
from engine.text import normalize_text
from rewards import keyword_counts, repeats_itself

# ---- corpora -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def corpus_at(folder):
    """Around torchaudio's reading of the corpus in `folder`: one clear line where it is not there, or not whole."""
    if not folder.exists():
        raise DataError(f"{folder}: no such folder; ROOT is what holds LibriSpeech/, LJSpeech-1.1/ or LibriTTS/")
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{folder}: incomplete, or not in the corpus' form ({error})") from None


def librispeech(args):
    """LibriSpeech: (rows of metadata, its folder)."""
    root = Path(args.root)
    folder = root / "LibriSpeech" / args.subset
    words, table = read_biasing(args.biasing, args.subset) if args.biasing else (None, None)
    with corpus_at(folder):
        given = dict(root=root, url=args.subset)
        corpus = LibriSpeechBiasing(**given, blist=words) if words else LIBRISPEECH(**given)
        rows, said = [], set()
        for i in tqdm(range(len(corpus)), desc=str(folder), leave=False, disable=None):
            name, _, text, speaker, _, _, *keywords = corpus.get_metadata(i)     # its loader would need TorchCodec
            said.add(Path(name).stem)
            keywords = table.get(Path(name).stem, []) if table else (keywords or [[]])[0]
            rows.append({"file_name": str(folder.parent / name), "text": text.lower(),
                         "keywords": [k.lower() for k in keywords], "voice": str(speaker)})
        for transcripts in folder.glob("*/*/*.trans.txt"):
            for line in transcripts.read_text(encoding="utf-8").splitlines():
                if line and line.split()[0] not in said:
                    raise FileNotFoundError(f"no audio for {line.split()[0]} of {transcripts.name}")
    if table and not said & table.keys():
        raise DataError(f"--biasing {args.biasing}: lists no utterance of {args.subset}; a table of another subset?")
    return rows, folder


def read_biasing(path, subset):
    """(set of upper-case rare words, None), or (None, {utterance: its rare words}), from a file or a folder."""
    path = Path(path)
    if path.is_dir():
        found = [file for pattern in (f"ref/{subset}.biasing_*.tsv", f"{subset}.biasing_*.tsv",
                                      "words/all_rare_words.txt", "all_rare_words.txt")
                 for file in sorted(path.glob(pattern))]
        if not found:
            raise DataError(f"--biasing {path}: neither {subset}.biasing_N.tsv nor all_rare_words.txt in it or its "
                            "folders ref and words")
        path = found[0]
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--biasing {path}: cannot be read ({error})") from None
    if path.suffix == ".tsv":
        try:
            return None, {line.split("\t")[0]: json.loads(line.split("\t")[2]) for line in lines}
        except (IndexError, json.JSONDecodeError):
            raise DataError(f"--biasing {path}: its lines are not utterance, text, [rare words], [biasing words]"
                            ) from None
    if not lines or any(len(line.split()) > 1 for line in lines):
        raise DataError(f"--biasing {path}: not a list of words, one a line")
    return {line.upper() for line in lines}, None       # a set: torchaudio looks every word up


def ljspeech(args):
    """LJSpeech: (rows of metadata, its folder)."""
    folder = Path(args.root) / "LJSpeech-1.1"
    with corpus_at(folder):
        LJSPEECH(args.root)
        with open(folder / "metadata.csv", encoding="utf-8", newline="") as table:
            lines = list(csv.reader(table, delimiter="|", quoting=csv.QUOTE_NONE))
        return [{"file_name": str(folder / "wavs" / f"{name}.wav"), "text": normalised, "voice": "lj"}
                for name, _, normalised in lines], folder


def libritts(args):
    """LibriTTS: (rows of metadata, its folder)."""
    folder = Path(args.root) / "LibriTTS" / args.subset
    with corpus_at(folder):
        LIBRITTS(args.root, url=args.subset)
        texts = sorted(folder.glob("*/*/*.normalized.txt"))
        stems = {text.name.removesuffix(".normalized.txt") for text in texts}
        for wave in folder.glob("*/*/*.wav"):
            if wave.stem not in stems:
                raise FileNotFoundError(f"no normalised text for {wave.name}")
        return [{"file_name": str(text.with_name(text.name.replace(".normalized.txt", ".wav"))),
                 "text": text.read_text(encoding="utf-8").strip(), "voice": text.name.split("_")[0]}
                for text in texts], folder


# ---- pools -------------------------------------------------------------------------------------------------

def read_pool(args):
    """The rows of DIR, "file_name" made absolute; bad ones are named as load_folder names them."""
    folder = Path(args.folder)
    if not (folder / "metadata.jsonl").is_file():
        raise DataError(f"{folder}: no such folder, or no metadata.jsonl in it")

    def read(line):
        row = parse_row(line, "file_name", "text")
        listed(row, "keywords", str), voice_of(row)
        row["file_name"] = str((folder / row["file_name"]).resolve())
        return {**row, "seconds": seconds_of(row["file_name"])}

    return read_lines(folder / "metadata.jsonl", read, args.skip_bad)


def seconds_of(path):
    """Length of an audio file, from its header alone. Raises DataError."""
    try:
        if not Path(path).is_file():
            raise DataError(f"{path}: {missing(Path(path))}")
        return sf.info(path).duration
    except (sf.LibsndfileError, OSError, TypeError):
        raise DataError(f"{path}: cannot be read as audio") from None


def eligible(args, rows):
    """The indices that the kind of pool admits, and a word about them."""
    every = range(len(rows))
    if args.kind == "length":
        order = sorted(every, key=lambda i: rows[i]["seconds"])
        half = {"short": order[:len(rows) // 2], "long": order[len(rows) // 2:]}.get(args.half, order)
        return sorted(i for i in half if args.min_seconds <= rows[i]["seconds"] <= args.max_seconds), "fit"
    if args.kind == "keywords":
        said = [keyword_counts(row["text"], "", row.get("keywords") or [], args.language)[2] for row in rows]
        return [i for i in every if said[i] >= args.least], f"say {args.least} keywords or more"
    if args.kind == "disagreement":
        return hard_cases(args, rows)
    return list(every), "are there"


def hard_cases(args, rows):
    """D1 [paper]: clips that different recognisers hear differently, or of which one hears a long repetition."""
    if same_model(args.model, args.second_model):
        raise DataError("--second-model must not be --model: they would never disagree")
    first, second = (transcripts(args, rows, name, flag) for name, flag in
                     ((args.model, "--model"), (args.second_model, "--second-model")))
    heard = {i: [normalize_text(t[i], args.language) for t in (first, second)] for i in range(len(rows))
             if None not in (first[i], second[i])}
    differ = {i for i, (a, b) in heard.items() if a != b}
    loops = {i for i, texts in heard.items() if any(map(repeats_itself, texts))}
    return sorted(differ | loops), (f"are hard ({len(differ)} heard differently, {len(loops)} with long repetitions, "
                                    f"{len(rows) - len(heard)} that a recogniser failed on)")


def transcripts(args, rows, model, flag):
    """What `model` hears in each row, None where it fails. Every batch is appended to OUT/transcripts.jsonl at once, so
    that a run that was stopped goes on; remove that file when the model behind a name has changed."""
    table, known = Path(args.out) / "transcripts.jsonl", {}
    table.parent.mkdir(parents=True, exist_ok=True)
    key = lambda row: (row["model"], row["language"], row["file_name"])  # noqa: E731
    if table.exists():                                      # stopped in the middle of a line: that line goes
        kept = read_rows(table)
        replace_file(table, lambda path: path.write_text("".join(map(as_line, kept)), encoding="utf-8"))
        known = {key(row): row["text"] for row in kept}
    asked = [{"model": model, "language": args.language, "file_name": row["file_name"]} for row in rows]
    todo = [i for i in range(len(rows)) if key(asked[i]) not in known]
    todo.sort(key=lambda i: rows[i]["seconds"])             # batches of clips alike in length
    if todo:
        judge = Judge(model, pick_device(args.device), language=args.language, flag=flag)
        with open(table, "a", encoding="utf-8") as out:
            for start in tqdm(range(0, len(todo), args.batch), desc=f"{flag} {model}", leave=False, disable=None):
                part = todo[start:start + args.batch]
                waves = [decode_audio(rows[i]["file_name"], judge.rate) for i in part]  # not to be kept
                for i, text in zip(part, judge.transcribe(waves, args.batch)):
                    known[key(asked[i])] = text
                    out.write(json.dumps({**asked[i], "text": text}, ensure_ascii=False) + "\n")
                out.flush()
    return [known[key(row)] for row in asked]


def choose(args):
    """The rows of a pool, and a word about where they come from."""
    rows = read_pool(args)
    found, note = eligible(args, rows)
    drawn = np.random.default_rng(args.seed).permutation(found).tolist()
    if args.one_per_voice:
        first = {}
        for i in drawn:
            first.setdefault(rows[i].get("voice"), i)
        drawn = list(first.values())
    chosen = sorted(drawn[:args.count])
    if not chosen:
        raise DataError(f"{args.folder}: none of its {len(rows)} clips is eligible")
    print(f"{len(found)} of {len(rows)} clips {note}"
          + (f"; fewer than --count {args.count}: all are taken" if len(chosen) < (args.count or 0) else ""))
    return [rows[i] for i in chosen], f"{len(chosen)} of {len(rows)} clips of {args.folder}"


# ---- main --------------------------------------------------------------------------------------------------

def write_folder(out, rows):
    """OUT/metadata.jsonl, whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({key: value for key, value in row.items() if key != "seconds"}, ensure_ascii=False) + "\n"
             for row in rows]
    replace_file(out / "metadata.jsonl", lambda path: path.write_text("".join(lines), encoding="utf-8"))


def prepare(args):
    """One command, from its source to OUT."""
    out = Path(args.out)
    if (out / "metadata.jsonl").exists():
        raise DataError(f"--out {out}: holds a data set already; remove its metadata.jsonl, or give another --out")
    if args.command == "select":
        rows, note = choose(args)
    else:
        args.root = str(Path(args.root).expanduser().resolve())
        rows, folder = {"librispeech": librispeech, "ljspeech": ljspeech, "libritts": libritts}[args.command](args)
        note = f"{len(rows)} clips of {folder}"
        if not rows:
            raise DataError(f"{folder}: no audio in it; incomplete, or an archive that was not extracted?")
        for row in tqdm(rows, desc="audio", leave=False, disable=None):
            row["seconds"] = seconds_of(row["file_name"])
    write_folder(out, rows)
    seconds, voices = [row["seconds"] for row in rows], {row.get("voice") for row in rows}
    print(f"{note}: {sum(seconds) / 3600:.2f} h, {min(seconds):.1f} to {max(seconds):.1f} s, {len(voices)} voices, "
          f"{sum(len(row.get('keywords') or []) for row in rows)} keywords, in {out / 'metadata.jsonl'}")


def main(argv=None):
    args = parse_args(argv)
    quiet()
    try:
        prepare(args)
    except DataError as error:
        sys.exit(f"error: {error}")
    except torch.cuda.OutOfMemoryError:
        sys.exit(f"error: the GPU's memory is full; lower --batch (now {args.batch}). What is transcribed is kept")
    except OSError as error:
        sys.exit(f"error: {args.out}: cannot be written ({error})")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on with what is there already")


if __name__ == "__main__":
    main()
