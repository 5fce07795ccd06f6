"""A page to hear and see what training changed: write_page makes a folder with index.html, its sounds and pictures.

A card a sentence: before | after, each with a player, a mel picture and the transcript, its errors marked. The page
opens from disk, needs no network, and names its files relative to itself, so that the folder can be moved.
"""
from html import escape
from pathlib import Path

import jiwer
import matplotlib
import numpy as np
import soundfile as sf
import torch
from torchaudio.transforms import MelSpectrogram

from engine.text import by_character, normalize_text
from rewards import edit_counts

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHORTEST = 0.1      # seconds; a shorter clip is filled up with silence: it still plays and has a few mel frames
RANGE = 70          # dB from the brightest point of a sentence's two pictures to black
QUIET = -10         # dB; a picture in which nothing is louder stays dark instead of showing its noise (speech: +30)
KHZ = (0.5, 1, 2, 4, 8)
# Of the pictures, which have no background: a grey that is readable on the white page and on the black one.
STYLE = {"font.size": 8, "axes.edgecolor": "none", "axes.labelcolor": "#858585", "xtick.color": "#858585",
         "ytick.color": "#858585"}

CSS = """
:root { color-scheme: light dark; --page: #f5f5f2; --card: #fff; --ink: #202225; --soft: #63666b; --line: #e2e2dc;
  --ins: #0a58b5; --ins-bg: #e4effc; --del: #b3261e; --sub: #845000; --sub-bg: #fdf0d5 }
@media (prefers-color-scheme: dark) { :root { --page: #141517; --card: #1d1f22; --ink: #e7e6e2; --soft: #a0a19d;
  --line: #34373b; --ins: #8fbcff; --ins-bg: #1c2d45; --del: #ff9c92; --sub: #f3bd6d; --sub-bg: #3a2d16 } }
body { margin: 0 auto; padding: 1.5rem 1rem; max-width: 62rem; background: var(--page); color: var(--ink);
  font: 1rem/1.35 system-ui, sans-serif; overflow-wrap: anywhere }
h1, h2, h3, p { margin: 0 }   h1 { font-size: 1.6rem }   h2 { font-size: 1.2rem }
h3 { font-size: 1rem; display: flex; justify-content: space-between; align-items: baseline; margin-top: .8rem }
article { margin: 1rem 0; padding: 1rem; background: var(--card); border: 1px solid var(--line); border-radius: 9px }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 0 1.6rem }
audio { width: 100%; height: 2.5rem; margin: .5rem 0 }   img { display: block; width: 100% }
.soft { color: var(--soft); font-size: .9rem; font-weight: normal; margin: .2rem 0 }
.marks { line-height: 2.1 }   .marks span { display: inline-block; margin-right: 1.2rem }   rt { font-size: .7em }
ins { color: var(--ins); background: var(--ins-bg); padding: 0 .2em; text-decoration: underline 2px }
del { color: var(--del); text-decoration: line-through 2px }
ruby { color: var(--sub); background: var(--sub-bg); padding: 0 .2em; border-bottom: 2px dotted }
"""
INTRO = """<p class="soft">The same sentences before and after training. Under each stands what a recogniser heard,
compared with the text; lower case and no punctuation, as errors are counted.</p>
<p class="marks"><span><ins>word</ins> heard, not in the text</span> <span><del>word</del> in the text, not heard</span>
<span><ruby>heard<rt>text</rt></ruby> heard in place of the text</span></p>"""
# Two players at once cannot be compared: starting one pauses the others.
SCRIPT = """<script>document.addEventListener("play", event => document.querySelectorAll("audio").forEach(
  player => player === event.target || player.pause()), true)</script>"""


def marked(text, hypothesis, language="en"):
    """The hypothesis as HTML: the tokens that WER counts, inserted <ins>, deleted <del>, substituted <ruby>."""
    said, heard = (escape(normalize_text(t, language)).split() for t in (text, hypothesis))
    if said and heard:
        chunks = jiwer.process_words(" ".join(said), " ".join(heard)).alignments[0]
        runs = [(c.type, said[c.ref_start_idx:c.ref_end_idx], heard[c.hyp_start_idx:c.hyp_end_idx]) for c in chunks]
    else:                                               # jiwer refuses an empty text
        runs = [("delete", said, [])] * bool(said) + [("insert", [], heard)] * bool(heard)
    marks = []
    for kind, in_text, in_transcript in runs:
        if kind == "substitute":                        # word over word: jiwer gives as many of the one as of the other
            marks += [f"<ruby>{h}<rt>{t}</rt></ruby>" for t, h in zip(in_text, in_transcript)]
        else:
            words = " ".join(in_transcript or in_text)
            marks.append({"equal": words, "insert": f"<ins>{words}</ins>", "delete": f"<del>{words}</del>"}[kind])
    return " ".join(marks) or '<span class="soft">(nothing)</span>'


def count_errors(text, hypothesis, language="en"):
    """"2 errors in 9 words", or characters where the language writes no spaces."""
    *wrong, length = edit_counts(text, hypothesis, language)
    unit = "character" if by_character(language) else "word"
    return f"{sum(wrong)} error{'s' * (sum(wrong) != 1)} in {length} {unit}{'s' * (length != 1)}"


def playable(wave, rate):
    """float32 (samples,) -> the same in [-1, 1] and at least SHORTEST long; what is not a number becomes silence."""
    wave = np.nan_to_num(np.asarray(wave, dtype=np.float32), posinf=1, neginf=-1).clip(-1, 1)
    return np.pad(wave, (0, max(0, round(SHORTEST * rate) - len(wave))))


def mel_pictures(waves, rate):
    """{path: float32 (samples,)} -> a log-mel PNG at every path, all of one time axis and one scale of brightness."""
    # windows of 31 ms in an FFT of twice their length: below 300 Hz a mel band is narrower than a bin would be
    to_mel = MelSpectrogram(rate, n_fft=rate // 16, win_length=rate // 32, hop_length=rate // 100, n_mels=80)
    mels = {path: 10 * to_mel(torch.from_numpy(wave)).clamp(min=1e-10).log10() for path, wave in waves.items()}
    top = max(QUIET, *(mel.max().item() for mel in mels.values()))                     # dB
    height = lambda hertz: 2595 * np.log10(1 + hertz / 700)  # noqa: E731                mel, as torchaudio has it
    ticks = [khz for khz in KHZ if 2000 * khz <= rate]
    for path, mel in mels.items():                                                     # (bands, frames)
        with plt.rc_context(STYLE):
            figure, axis = plt.subplots(figsize=(4.4, 1.7), layout="constrained")
            axis.imshow(mel, origin="lower", aspect="auto", cmap="magma", vmin=top - RANGE, vmax=top,
                        extent=(0, len(waves[path]) / rate, 0, height(rate / 2)))
            axis.set(xlabel="seconds", ylabel="kHz", xlim=(0, max(len(wave) for wave in waves.values()) / rate))
            axis.set_yticks([height(1000 * khz) for khz in ticks], ticks)
            figure.savefig(path, dpi=140, transparent=True)
            plt.close(figure)


def half_card(name, when, row, language):
    """HTML of one half of a card; a placeholder where there is no sound yet."""
    if not row.get(when):
        return f'<section><h3>{when}</h3><p class="soft">not yet: training has not ended</p></section>'
    heard = row[when]["heard"]
    return f"""<section><h3>{when} <span class="soft">{count_errors(row["text"], heard, language)}</span></h3>
<audio controls preload="metadata" src="{name}.wav" aria-label="{when}"></audio>
<img src="{name}.png" alt="log-mel spectrogram, {when}">
<p class="marks" dir="auto">{marked(row["text"], heard, language)}</p></section>"""


def write_page(folder, rows, rate, title, language="en"):
    """Writes index.html, NN-before.wav, NN-before.png, NN-after.wav, NN-after.png; returns the page's path.

    `rows`: {"text": str, "voice": str, "before": {"wave": float32 (samples,) at `rate` Hz, "heard": str},
    "after": the same, or missing as long as training runs}.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    cards = []
    for number, row in enumerate(rows, 1):
        names = {when: f"{number:02}-{when}" for when in ("before", "after")}
        waves = {names[when]: playable(row[when]["wave"], rate) for when in names if row.get(when)}
        for name, wave in waves.items():
            sf.write(folder / f"{name}.wav", wave, rate, subtype="PCM_16")
        mel_pictures({folder / f"{name}.png": wave for name, wave in waves.items()}, rate)
        halves = "".join(half_card(name, when, row, language) for when, name in names.items())
        cards.append(f"""<article><h2 dir="auto">{escape(row["text"]) or "(no text)"}</h2>
<p class="soft">voice {escape(row["voice"])}</p><div class="pair">{halves}</div></article>""")
    page = f"""<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{CSS}</style>
<body><h1>{escape(title)}</h1>{INTRO}{"".join(cards)}{SCRIPT}</body></html>"""
    (folder / "index.html").write_text(page, encoding="utf-8")
    return folder / "index.html"
