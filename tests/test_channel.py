"""tools/channel.py: what a channel does to a recording, and which recordings go through it."""
import json

import numpy as np
import pytest
import soundfile as sf

from tools import channel

RATE = 16_000


def tone(hertz, seconds=1.0):
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * RATE)) / RATE)).astype(np.float32)


def loudness(wave):
    return float(np.sqrt(np.mean(wave[1600:-1600] ** 2)))


@pytest.fixture
def folder(tmp_path):
    """Nine clips: eight tones, the ninth in noise of its own."""
    (tmp_path / "in/audio").mkdir(parents=True)
    rows = [{"file_name": f"audio/{i}.wav", "text": f"clip {i}", "keywords": ["clip"],
             "snr_db": 5.0 if i == 8 else None} for i in range(9)]
    for i, row in enumerate(rows):
        sf.write(tmp_path / "in" / row["file_name"], tone(300 + 100 * i), RATE)
    (tmp_path / "in/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def sent(folder, kind, *flags):
    """What comes out: rows, waveforms."""
    channel.main([kind, str(folder / "in"), "--out", str(folder / kind), *flags])
    rows = [json.loads(line) for line in (folder / kind / "metadata.jsonl").read_text().splitlines()]
    return rows, [sf.read(folder / kind / row["file_name"], dtype="float32")[0] for row in rows]


def test_a_telephone_has_its_band_and_its_eight_bits():
    kept = {hertz: loudness(channel.telephone(tone(hertz))) / loudness(tone(hertz)) for hertz in (100, 1000, 5000)}
    assert kept[100] < 0.15 and kept[1000] > 0.9 and kept[5000] < 0.01
    carried = np.fft.rfft(channel.telephone(tone(1000)))
    carried[990:1011] = 0                                                  # without the tone: what 8 bits leave
    rest = loudness(np.fft.irfft(carried, RATE)) / loudness(tone(1000))
    assert 0.002 < rest < 0.03


def test_opus_keeps_the_length_and_most_of_the_sound():
    out = channel.opus(tone(1000))
    assert len(out) == RATE and 0.8 < loudness(out) / loudness(tone(1000)) < 1.2
    assert np.abs(out - tone(1000)).max() > 0.01


def test_babble_is_as_far_below_as_asked():
    wave = tone(1000)
    mixed = channel.babble(wave, [tone(400), tone(2000, 0.5)], 10)
    behind = mixed - wave * (mixed @ wave / (wave @ wave))
    assert 20 * np.log10(loudness(wave) / loudness(behind)) == pytest.approx(10, abs=0.3)


def test_clips_without_noise_of_their_own_go_through_and_keep_what_is_said_of_them(folder):
    rows, waves = sent(folder, "clean")
    assert [row["text"] for row in rows] == [f"clip {i}" for i in range(8)] and rows[0]["keywords"] == ["clip"]
    assert np.abs(waves[3] - tone(600)).max() < 1e-4
    _, behind = sent(folder, "babble", "--snr", "0")
    assert all(loudness(mixed - tone(300 + 100 * i)) > 0.05 for i, mixed in enumerate(behind))


def test_what_cannot_be_sent_is_said_in_a_line(folder, capsys):
    sent(folder, "clean")
    for flags, message in ((["clean", f"{folder}/in", "--out", f"{folder}/clean"], "holds a data folder already"),
                           (["clean", f"{folder}/none", "--out", f"{folder}/x"], f"error: {folder}/none")):
        with pytest.raises(SystemExit, match=message):
            channel.main(flags)
    lines = (folder / "in/metadata.jsonl").read_text().splitlines()[:6]
    (folder / "in/metadata.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(SystemExit, match="more than 6 clips .* there are 6"):
        channel.main(["babble", f"{folder}/in", "--out", f"{folder}/y"])
