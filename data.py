"""Data: audio folders in, batches out, and the log of a run.

A data set is a folder with `metadata.jsonl`, one JSON object a line, and the audio that it names (the AudioFolder
form): {"file_name": "audio/0001.ogg", "text": "...", "keywords": ["anna"]}. Any rate, mono or stereo, whatever
soundfile reads (wav, flac, ogg, mp3).

    load_folder(folder)                   checked utterances, or one clear line that says what is wrong and where
    load_sentences(path)                  texts to be spoken, from a plain text file or a metadata.jsonl
    batch_indices(step, ...)              which utterances a step trains on: a function of the seed and the step alone
    collate(processor, utterances, ...)   the model's inputs
    RunLog(folder), Phases(device)        log.jsonl, samples.jsonl: written line by line, never over an older run
    load_pretrained, pick_device          transformers' loaders and torch's devices, with one clear line for a mistake
"""
import contextlib
import ctypes
import functools
import json
import os
import pickle
import resource
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import soundfile as sf
import torch
import torchaudio
import transformers
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from tqdm import tqdm

from recognisers import RECOGNISERS, ask, rate, recogniser, settle
from rewards import normalize_text

EMBEDDED = Path(__file__).resolve().parent / "data"
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


def split_sentences(args):
    """(texts of --data, texts of --test). Without --test: the embedded test texts; where --data is the user's own, a
    tenth of it (at most 100). A text of both is left out of the training."""
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


def load_sets(args, rate):
    """What a script trains and tests on: (utterances of --data, {name: utterances} of --test).

    Without --test: the embedded test sets; where --data is the user's own, a tenth of it (at most 200) is held out.
    """
    def read(folder):
        return load_folder(folder, rate, args.max_seconds, args.skip_bad)

    train = [u for folder in args.data for u in read(folder)]
    if args.test or all(Path(folder).resolve().is_relative_to(EMBEDDED) for folder in args.data):
        folders = [Path(folder) for folder in args.test or sorted((EMBEDDED / "test").iterdir())]
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
    return train, tests


@functools.lru_cache(maxsize=2)
def epoch_order(epoch, count, seed):
    """The order in which one epoch visits its `count` utterances."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def batch_indices(step, count, batch, seed):
    """The `batch` indices below `count` that step `step` trains on: every epoch in a new order, nothing left out.

    A function of its arguments alone, so that a resumed run draws what the unbroken one would have drawn.
    """
    return [int(epoch_order(at // count, count, seed)[at % count]) for at in range(step * batch, (step + 1) * batch)]


def collate(processor, utterances, language, hotwords=False):
    """The processor's inputs for a batch: `input_ids` (B, L) padded on the left, `input_features` (Fun-ASR-Nano: B,
    frames, 560) and their masks. `hotwords` puts each utterance's keywords into its prompt."""
    keywords = [list(u.keywords) for u in utterances] if hotwords else None
    if hotwords and not recogniser(processor).keywords:
        raise DataError(f"--hotwords: the prompt of a {type(processor).__name__} has no place for keywords")
    try:
        return ask(processor, [u.waveform(rate(processor)) for u in utterances], language, keywords)
    except ValueError as error:
        raise DataError(f"--language {language}: the model's processor refuses it ({error})") from None
    except ImportError as error:                                                    # Voxtral's needs mistral-common
        raise DataError(f"a {type(processor).__name__}: {str(error).strip().splitlines()[0]}") from None


# ---- the log of a run --------------------------------------------------------------------------------------

class RunLog:
    """A run folder. `log.jsonl`: first a header (arguments, commit, versions, device, seed), then a line a step."""

    def __init__(self, folder, header, resume_at=None):
        """A new folder, or with `resume_at` (a step) an old one whose lines from that step on are dropped.

        Raises DataError if a new run would write over an old one that has saved something.
        """
        self.folder = Path(folder)
        if resume_at is None:
            if (self.folder / "log.jsonl").exists() and (self.folder / "state.pt").exists():
                raise DataError(f"{self.folder}: holds a run already; continue it with --resume {self.folder}, "
                                "or give another --out")
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in ("log", "samples"):             # of a run that ended before it had anything to save
                (self.folder / f"{name}.jsonl").unlink(missing_ok=True)
            self.write("log", header)
        else:
            for name in ("log", "samples"):
                path = self.folder / f"{name}.jsonl"
                lines = path.read_text().split("\n")[:-1] if path.exists() else []
                kept = [line for line in lines if json.loads(line).get("step", -1) < resume_at]
                if name == "log":
                    kept[0] = json.dumps(rounded(header), ensure_ascii=False)  # what the run is given from here on
                path.write_text("".join(line + "\n" for line in kept))

    def write(self, name, row):
        """Appends `row` to NAME.jsonl, floats to 6 digits."""
        with open(self.folder / f"{name}.jsonl", "a") as out:
            out.write(json.dumps(rounded(row), ensure_ascii=False) + "\n")

    def summary(self, row):
        """Writes summary.json."""
        (self.folder / "summary.json").write_text(json.dumps(rounded(row), indent=1, ensure_ascii=False) + "\n")


def rounded(value):
    """`value` with every float in it at 6 significant digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list | tuple) else value


def new_run_folder(name):
    """runs/NAME-YYYYMMDD-HHMMSS, with a number behind it if that exists."""
    stem = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return next(p for p in [stem, *(Path(f"{stem}-{i}") for i in range(2, 100))] if not p.exists())


def run_header(args, device, policy):
    """What a run was given, for the first line of its log."""
    import importlib.metadata
    import platform
    import subprocess

    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True,
                             cwd=Path(__file__).parent).stdout.strip()
    except OSError:  # no git on this machine
        git = ""
    packages = ("torch", "transformers", "peft", "bitsandbytes", "jiwer")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return {"arguments": vars(args), "commit": git or "unknown",
            "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}},
            "device": name, "dtype": str(policy.get_base_model().dtype), "seed": args.seed,
            "trained": sum(p.numel() for p in policy.parameters() if p.requires_grad)}


def logged_arguments(folder):
    """The arguments of the run in `folder`, from the first line of its log. Raises DataError where there are none."""
    try:
        with open(Path(folder) / "log.jsonl", encoding="utf-8") as log:
            return json.loads(log.readline())["arguments"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{folder}: no run there (a readable log.jsonl with its arguments)") from None


def saved_arguments(folder):
    """The arguments of the run in `folder`, to resume it."""
    try:
        saved = logged_arguments(folder)
    except DataError as error:
        raise DataError(f"--resume {error}") from None
    if not (Path(folder) / "state.pt").exists():
        raise DataError(f"--resume {folder}: no state.pt in it: the run ended before its first evaluation")
    return {**saved, "out": str(folder), "resume": str(folder)}


def clipped_step(optimizer, weights, step):
    """Clips the gradient to norm 1, takes one step of the optimiser and clears the gradient; returns the norm.

    A gradient that is not finite would end the adapter for good: that step is left out, and says so.
    """
    norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
    if norm.isfinite():
        optimizer.step()
    else:
        tqdm.write(f"step {step}: the gradient is not finite, step left out")
    optimizer.zero_grad()
    return norm


def save_state(policy, optimizer, folder, state):
    """The latest adapter and optimizer state, for --resume; state.pt is moved into place, so never half there."""
    torch.save({**state, "adapter": get_peft_model_state_dict(policy), "optimizer": optimizer.state_dict()},
               folder / "state.tmp")
    (folder / "state.tmp").replace(folder / "state.pt")


def load_state(policy, optimizer, folder):
    """Puts back what `save_state` wrote, and returns the rest of it."""
    try:
        state = torch.load(Path(folder) / "state.pt", weights_only=True, map_location="cpu")
        set_peft_model_state_dict(policy, state.pop("adapter"))
        optimizer.load_state_dict(state.pop("optimizer"))
    except (OSError, RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"--resume {folder}: its state.pt does not fit this model or is damaged ({reason})") from None
    return state


def load_adapter(policy, folder):
    """The adapter weights that `policy.save_pretrained(folder)` wrote."""
    set_peft_model_state_dict(policy, safetensors.torch.load_file(folder / "adapter_model.safetensors"))


class Phases:
    """Seconds per phase of a step, and the peak of memory in GiB by phase: on a GPU the tensors' own, else the
    process's so far."""

    def __init__(self, device):
        self.device, self.step, self.total, self.peaks = device, {}, {}, {}

    @contextlib.contextmanager
    def __call__(self, name):
        self.synchronize()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        started = time.perf_counter()
        yield
        self.synchronize()
        spent = time.perf_counter() - started
        self.peaks[name] = max(self.peaks.get(name, 0.0), self.memory_gib())
        for seconds in (self.step, self.total):
            seconds[name] = seconds.get(name, 0.0) + spent

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def take(self):
        """The seconds since the last call, by phase."""
        taken, self.step = self.step, {}
        return taken

    def peak_gib(self):
        """The highest peak of any phase so far."""
        return max(self.peaks.values(), default=self.memory_gib())

    def memory_gib(self):
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2 ** 30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


# ---- torch and transformers, with clear words for a user's mistake -----------------------------------------

def pick_device(name):
    """torch.device for "auto", "cpu", "cuda" or "cuda:1"."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DataError(f"--device {name}: no such device; auto, cpu, cuda or cuda:0") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DataError(f"--device {name}: torch sees no GPU here; --device cpu, or a driver that fits torch "
                        f"{torch.__version__}")
    if device.type not in ("cpu", "cuda"):
        raise DataError(f"--device {name}: cpu and cuda are what this was tried on")
    if device.type == "cpu":
        keep_freed_memory()
    else:       # the CPU makes features of small clips: 32 threads took ten times as long for it as two
        torch.set_num_threads(min(2, torch.get_num_threads()))
        # cuDNN's attention, torch 2.11's first choice on an H100, gives NaN gradients where padded prompts are
        # 64, 192, 320, ... positions long (pytorch issue 196678); the others do not
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def load_pretrained(auto_class, name, flag="--model", **options):
    """`auto_class.from_pretrained(name)`, safetensors only and no remote code; DataError when it can't be had."""
    if not Path(name).is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "checkpoints/"))):
        made = f"; python pretrain.py {Path(name).name} makes it" if name.startswith("checkpoints/") else ""
        raise DataError(f"{flag} {name}: no such folder, and not of the form OWNER/NAME of a hub id{made}")
    try:
        if not hasattr(auto_class, "_model_mapping"):
            return auto_class.from_pretrained(name, **options)
        model, found = auto_class.from_pretrained(name, use_safetensors=True, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, ImportError, safetensors.SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{flag} {name}: cannot be loaded ({reason})") from None
    if found["missing_keys"]:       # transformers would fill them with random numbers
        raise DataError(f"{flag} {name}: has no weights for {sorted(found['missing_keys'])[0]} of "
                        f"{type(model).__name__}: made for another task?")
    return model


def load_recogniser(name, flag="--model", **options):
    """(processor, model) of any class in recognisers.py, put right; DataError for any other, before it is loaded."""
    processor = load_pretrained(transformers.AutoProcessor, name, flag)
    known = {kind: row for kind, row in RECOGNISERS.items() if row.hear or flag != "--model"}    # Whisper only judges
    row = recogniser(processor)
    if row not in known.values():
        raise DataError(f"{flag} {name}: comes with a {type(processor).__name__}; known are {', '.join(known)}")
    model = load_pretrained(row.loader, name, flag, **options)
    if recogniser(model) is not row:
        raise DataError(f"{flag} {name}: is a {type(model).__name__}; known are {', '.join(known)}")
    processor.tokenizer.padding_side = "left"
    return processor, settle(mend_attention(model))


def mend_attention(model):
    """Gives every part of `model` the attention of the whole, and returns the model.

    transformers 5.23 leaves it unset for the adaptor of Fun-ASR-Nano, whose attention then adds the padding mask as
    a number instead of applying it: a clip's transcript depended on the clips beside it in the batch.
    """
    for name in model.config.sub_configs:
        part = getattr(model.config, name)
        if part is not None and part._attn_implementation is None:
            part._attn_implementation = model.config._attn_implementation
    return model


def quiet():
    """Silences what the libraries say once per layer and call; errors still come through."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="MatMul8bitLt|.*is_gradient_checkpointing|Support for mismatched")


def keep_freed_memory():
    """On Linux: freed tensors stay with the process. glibc hands large ones back to the system at every turn, and
    the page faults of getting them again took 15 % of a step on a CPU."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 2 ** 30)      # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD
