"""Audio files in, waveforms out: whatever soundfile reads, checked before it is decoded, and kept in memory.

    read_audio(path, rate)      mono float32 (samples,), kept for the next time; decode_audio the same, not kept
    DataError                   what every mistake of a user becomes: one line
"""
import os
import struct
import unicodedata
from collections import OrderedDict
from fractions import Fraction
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
import torchaudio

SHORTEST = 0.1      # seconds; a shorter clip has hardly a frame of features
LONGEST = 7200      # seconds, and
MOST_SAMPLES = 2 ** 29      # of all channels: what a header may claim before anything is read
RATES = 4_000, 400_000      # Hz
LOUDEST = 10        # times full scale: samples beyond are no sound, or were never scaled


class DataError(ValueError):
    """Something in a user's data or arguments is wrong: one line that says what, where and how to mend it."""


def reason(error):
    """The first line of what an exception says, or its name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Cache(OrderedDict):
    """Decoded audio, the latest used last, at most `limit` bytes of it."""

    limit, held = 2 ** 30, 0

    def keep(self, key, wave):
        self[key] = wave
        self.held += wave.nbytes
        while self.held > self.limit:
            self.held -= self.popitem(last=False)[1].nbytes


CACHE = Cache()


def read_audio(path, rate):
    """`decode_audio(path, rate)`, which is kept for the next time."""
    key = os.fspath(path), rate
    if key in CACHE:
        CACHE.move_to_end(key)
        return CACHE[key]
    wave = decode_audio(path, rate)
    CACHE.keep(key, wave)
    return wave


def decode_audio(path, rate):
    """The file as a mono float32 array (samples,) at `rate` Hz. Raises DataError for anything but sound.

    Mono is the mean of the channels, or the loudest of them where they cancel each other out.
    """
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        raise DataError(f"{path}: {missing(Path(path))}")
    try:
        info = sf.info(path)
        check_header(path, info)
        wave, original = sf.read(path, dtype="float32", always_2d=True)     # (samples, channels)
    except DataError:
        raise
    except (sf.LibsndfileError, OSError, TypeError, ValueError, MemoryError) as error:
        pointer = is_pointer(path)
        raise DataError(f"{path}: {pointer or f'cannot be read as audio ({error})'}") from None
    if info.format == "FLAC" and len(wave) < info.frames:       # others' numbers are estimates, or the samples' own
        raise DataError(f"{path}: ends after {len(wave)} of {info.frames} samples: copied in part?")
    mono = wave.mean(axis=1)
    loudness = lambda x: np.sqrt(np.square(x, dtype=np.float64).mean(axis=0)) if len(x) else 0.0  # noqa: E731
    if wave.shape[1] > 1 and loudness(mono) < 0.3 * np.max(loudness(wave)):         # one inverted, say
        mono = wave[:, np.argmax(loudness(wave))].copy()
    if not np.isfinite(mono).all():
        raise DataError(f"{path}: holds {int((~np.isfinite(mono)).sum())} samples that are not numbers")
    if len(mono) < SHORTEST * original:
        raise DataError(f"{path}: {len(mono) / original:.2f} s long, under the least of {SHORTEST} s")
    if (peak := float(np.abs(mono).max())) > LOUDEST:
        raise DataError(f"{path}: has samples of {peak:.3g}, where full scale is 1: not scaled, or damaged")
    if original != rate:    # a ratio near enough (to 1e-6 at 44,101 Hz) whose filter has a million numbers at most
        ratio = Fraction(original, rate).limit_denominator(int((1e6 * rate / original) ** 0.5))
        mono = torchaudio.functional.resample(torch.from_numpy(mono), ratio.numerator, ratio.denominator).numpy()
    return mono


def check_header(path, info):
    """DataError for a header that claims more than there can be, and for a WAV that holds less than it says."""
    if info.frames * info.channels > MOST_SAMPLES or info.duration > LONGEST:
        raise DataError(f"{path}: claims {info.duration / 3600:.3g} hours in {info.channels} channels; "
                        f"{LONGEST // 3600} hours are the most, or its header is damaged")
    if not RATES[0] <= info.samplerate <= RATES[1]:
        raise DataError(f"{path}: a rate of {info.samplerate} Hz; those from {RATES[0]} to {RATES[1]} are read")
    if info.format not in ("WAV", "WAVEX"):
        return
    size = os.path.getsize(path)
    with open(path, "rb") as file:                      # libsndfile takes a data chunk for as long as the file is
        order = "<" if file.read(12)[:4] == b"RIFF" else ">"
        while len(chunk := file.read(8)) == 8:
            name, length = struct.unpack(f"{order}4sI", chunk)
            if name == b"data":
                missed = length - (size - file.tell())
                if missed > 0 and length < 2 ** 31 - 2 ** 16:       # a stream's writer leaves a number like 2^32 - 1
                    raise DataError(f"{path}: ends {missed} bytes before its header says: copied in part?")
                return
            file.seek(length + length % 2, 1)


def missing(path):
    """Why there is no file at `path`, as far as its name tells."""
    alike = lambda name: unicodedata.normalize("NFC", name).casefold()  # noqa: E731
    try:
        if path.exists():
            return "cannot be read as audio (not a regular file)"
        if "\\" in str(path):
            return "no such file; paths are written with /"
        for form in ("NFC", "NFD"):
            if Path(unicodedata.normalize(form, str(path))).exists():
                return f"no such file; there is one whose name is written in another Unicode form ({form})"
        if other := next((p.name for p in path.parent.iterdir() if alike(p.name) == alike(path.name)), None):
            return f"no such file; there is a {other}"
    except OSError:                                     # a name that is too long, a folder that is not there
        pass
    return "no such file"


def is_pointer(path):
    """What to say of a Git LFS pointer in the place of a file, "" where it is none."""
    with open(path, "rb") as file:
        return "a Git LFS pointer, not the file itself: git lfs pull" if file.read(19) == b"version https://git" else ""
