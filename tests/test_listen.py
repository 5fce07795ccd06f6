"""The page to listen to: what it marks, what it escapes, and that all it names is there."""
import re

import numpy as np
import pytest
import soundfile as sf
from matplotlib.image import imread

from engine.listen import count_errors, marked, playable, write_page

RATE = 16000


def clip(transcript, samples=RATE // 2):
    return {"wave": np.sin(np.arange(samples) / 5).astype(np.float32), "heard": transcript}


def row(text, before, after=None, voice="anna"):
    return {"text": text, "voice": voice, "before": before} | ({"after": after} if after else {})


@pytest.mark.parametrize("text, transcript, language, html, errors", [
    ("A cat sat.", "a cat sat", "en", "a cat sat", "0 errors in 3 words"),
    ("the cat sat down", "the big cat sad", "en", "the <ins>big</ins> cat <ruby>sad<rt>sat</rt></ruby> <del>down</del>",
     "3 errors in 4 words"),
    ("a b", "x y", "en", "<ruby>x<rt>a</rt></ruby> <ruby>y<rt>b</rt></ruby>", "2 errors in 2 words"),
    ("blue birds", "", "en", "<del>blue birds</del>", "2 errors in 2 words"),
    ("", "blue birds", "en", "<ins>blue birds</ins>", "2 errors in 0 words"),
    ("one", "one more", "en", "one <ins>more</ins>", "1 error in 1 word"),
    ("你好", "你", "zh", "你 <del>好</del>", "1 error in 2 characters"),
])
def test_marks(text, transcript, language, html, errors):
    assert marked(text, transcript, language) == html
    assert count_errors(text, transcript, language) == errors


def test_nothing_said_and_nothing_heard():
    assert "(nothing)" in marked("", "?!")


def test_playable():
    assert np.array_equal(playable([], RATE), np.zeros(1600))
    wave = playable(np.array([np.nan, np.inf, -9, 0.5] * RATE, np.float32), RATE)
    assert wave.dtype == np.float32 and wave[:4].tolist() == [0, 1, -1, 0.5] and len(wave) == 4 * RATE


@pytest.mark.parametrize("rate", [8000, 44100])
def test_all_that_the_page_names_is_there(tmp_path, rate):
    rows = [row("a cat", clip("a cat"), clip("", samples=0)), row("", clip("a dog"), clip("")), row("so", clip("no"))]
    page = write_page(tmp_path / "new" / "page", rows, rate, "Listen")
    html = page.read_text(encoding="utf-8")
    assert page.name == "index.html" and "http" not in html and html.count("<article>") == 3
    assert html.count("not yet") == 1                                # the third sentence has no "after"
    named = set(re.findall(r'(?:src|href)="([^"]*)"', html))
    assert named == {path.name for path in page.parent.iterdir()} - {"index.html"} and len(named) == 10
    for name in named:
        if name.endswith(".wav"):
            info = sf.info(page.parent / name)
            assert (info.samplerate, info.channels, info.subtype) == (rate, 1, "PCM_16")
            assert info.frames == (round(0.1 * rate) if name == "01-after.wav" else max(8000, round(0.1 * rate)))
        else:
            assert imread(page.parent / name).shape[2] == 4          # with transparency, for the dark page


def test_sound_survives(tmp_path):
    said = clip("a")
    page = write_page(tmp_path, [row("a", {**said, "wave": 3 * said["wave"]})], RATE, "Listen")
    wave, _ = sf.read(page.parent / "01-before.wav", dtype="float32")
    assert np.abs(wave - np.clip(3 * said["wave"], -1, 1)).max() < 1e-4


def test_hostile_text_is_escaped(tmp_path):
    hostile = '<script>alert("&")</script>'
    html = write_page(tmp_path, [row(hostile, clip(hostile), voice=hostile)], RATE, hostile).read_text(encoding="utf-8")
    assert hostile not in html and html.count("<script>") == 1       # the page's own
    assert html.count("&lt;script&gt;alert(&quot;&amp;&quot;)&lt;/script&gt;") == 4     # title twice, text, voice
