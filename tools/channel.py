"""A data folder as another channel carries it, to test what was learned on one under another.

    python -m tools.channel telephone data/test/short --out build/channel/telephone

    clean       the recordings as they are
    telephone   300 to 3,400 Hz, 8,000 samples a second, 8 bits of mu-law (ITU-T G.711)
    opus        Opus at the lowest rate that libsndfile offers, about 6 kbit/s
    babble      six other clips of the folder at once behind it, 10 dB below (--snr)

Of a folder those clips are taken that have no noise of their own: "snr_db" is null, or not there. The kinds and their
settings are our choice. Everything else in metadata.jsonl stays; what is said behind stands in no text.
"""
import argparse

VOICES = 6          # of babble


def parse_args(argv=None):
    """Which channel, of which folder."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("kind", choices=["clean", "telephone", "opus", "babble"])
    p.add_argument("folder", metavar="DIR", help="the data folder to send through it")
    p.add_argument("--out", required=True, metavar="DIR2", help="the data folder to write")
    p.add_argument("--snr", type=float, default=10.0, help="babble: speech over what is behind, dB (default: 10)")
    p.add_argument("--seed", type=int, default=1, help="babble: who speaks behind (default: 1)")
    return p.parse_args(argv)


if __name__ == "__main__":
    parse_args()  # --help and typing errors answer at once, before torch loads

import io
import json
import sys
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
from torchaudio import functional as F

from data import load_folder
from engine.audio import DataError

RATE = 16_000       # Hz


def telephone(wave):
    """float32 (samples,) at RATE as a telephone carries it, at RATE again."""
    band = F.lowpass_biquad(F.highpass_biquad(torch.from_numpy(wave), RATE, 300.0), RATE, 3_400.0)
    narrow = F.resample(band, RATE, 8_000).clamp(-1, 1)
    return F.resample(F.mu_law_decoding(F.mu_law_encoding(narrow, 256), 256), 8_000, RATE)[:len(wave)].numpy()


def opus(wave):
    """The same as Opus carries it."""
    file = io.BytesIO()
    sf.write(file, wave, RATE, format="OGG", subtype="OPUS", compression_level=1.0)
    file.seek(0)
    return sf.read(file, dtype="float32")[0][:len(wave)]


def babble(wave, others, snr):
    """The same before `others`, waveforms that are repeated or cut to its length, together `snr` dB below."""
    behind = sum(np.resize(other / np.sqrt(np.mean(other ** 2) + 1e-9), len(wave)) for other in others)
    loud = np.sqrt(np.mean(wave ** 2) / (np.mean(behind ** 2) + 1e-9) / 10 ** (snr / 10))
    mixed = wave + loud * behind
    return (mixed / max(1.0, np.abs(mixed).max() / 0.95)).astype(np.float32)


def main(argv=None):
    args = parse_args(argv)
    folder, out, rng = Path(args.folder), Path(args.out), np.random.default_rng(args.seed)
    try:
        clips = {clip.path.resolve(): clip for clip in load_folder(args.folder, RATE, 0)}
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
                if line.strip()]
        if (out / "metadata.jsonl").exists():
            raise DataError(f"--out {out}: holds a data folder already")
    except DataError as error:
        sys.exit(f"error: {error}")
    rows = [row for row in rows if row.get("snr_db") is None]
    waves = [clips[(folder / row["file_name"]).resolve()].waveform(RATE) for row in rows]
    spoken = [i for i, row in enumerate(rows) if row.get("text")]
    if args.kind == "babble" and len(spoken) <= VOICES:
        sys.exit(f"error: {folder}: babble needs more than {VOICES} clips with words and without noise, "
                 f"there are {len(spoken)}")
    (out / "audio").mkdir(parents=True, exist_ok=True)
    for i, (row, wave) in enumerate(zip(rows, waves)):
        if args.kind == "babble":
            others = rng.choice([j for j in spoken if j != i], VOICES, replace=False)
            wave = babble(wave, [waves[j] for j in others], args.snr)
        elif args.kind != "clean":
            wave = {"telephone": telephone, "opus": opus}[args.kind](wave)
        row["file_name"] = f"audio/{i:04}.flac"
        sf.write(out / row["file_name"], wave, RATE)
    (out / "metadata.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
                                        encoding="utf-8")
    print(f"{out}: {len(rows)} clips, {args.kind}")


if __name__ == "__main__":
    main()
