"""The corpus: sentences from a small grammar, spoken by two free synthesisers, with and without noise.

Only needed to build the embedded models and data again (`python -m pretrain`); running needs none of it.
Needs the programs `espeak-ng` and `flite` on the PATH (Debian: `apt-get install espeak-ng flite`).

    sentence(rng)              "marta will meet hannah in dover on monday" and its keywords
    speak(text, voice, rng)    the waveform at 16 kHz
    add_noise(wave, snr_db)    the same in noise
Everything here is our choice: the paper's data are in-house.
"""
import json
import re
import subprocess
import zlib

import numpy as np
import soundfile as sf
import torch
import torchaudio

SAMPLE_RATE = 16_000  # Hz

NAMES = """anna hannah marta martha maria marian peter pedro paul paula pablo clara klaus lara laura lena helena
elena ben benny david davis daniel danielle eric erica frank frances george georgia henry harry irene iris jack jacob
john joan jonas kate katie leo leon louis louise lucas lucia max maxine nina nora oscar oliver olivia rosa rosie ruth
simon simone sara sandra thomas tomas victor victoria walter wendy""".split()
PLACES = """paris berlin london londonderry dover andover oslo boston austin houston dallas denver geneva genoa
venice vienna verona rome romford madrid lisbon dublin durham derby bristol brighton cambridge canterbury oxford
bedford bradford stanford hamburg hanover harlow cairo kyoto tokyo toronto turin milan munich moscow lagos lima
manila miami memphis naples norwich preston princeton reading richmond salem salford seattle sydney windsor
""".split()
VOCABULARY = {
    "day": "monday tuesday wednesday thursday friday saturday sunday",
    "part": "morning afternoon evening night",
    "hour": "one two three four five six seven eight nine ten eleven twelve",
    "minute": "fifteen twenty thirty forty fifty",
    "count": "two three four five six seven eight nine ten twelve twenty",
    "vehicle": "train bus ferry tram boat plane taxi coach",
    "food": """apples pears carrots onions eggs cakes lemons beans potatoes mushrooms tomatoes peaches plums
        sandwiches cookies pancakes""",
    "thing": """bicycle lamp letter basket umbrella guitar piano camera ticket hammer ladder mirror blanket kettle
        window table carpet suitcase wallet helmet notebook pencil pillow bottle candle clock jacket sweater shovel
        bucket drum violin""",
    "adj": """small large heavy broken golden wooden yellow green purple silver empty narrow gentle quiet bright
        modern ancient expensive cheap strange famous hidden frozen""",
    "animal": "horse rabbit donkey parrot spider turtle tiger falcon badger beaver goose kitten puppy squirrel lizard",
    "place": "garden kitchen station library market harbour castle museum bakery hospital theatre forest valley bridge",
    "past": """bought found painted repaired carried noticed borrowed ordered collected followed washed covered
        measured photographed described forgot delivered""",
    "verb": "visit call meet follow answer invite thank help remember surprise join teach support",
    "weather": "rain snow fog thunder sunshine wind hail frost",
    "job": "doctor teacher farmer driver painter lawyer baker nurse pilot sailor writer singer builder gardener",
    "adverb": "slowly quickly quietly suddenly carefully often never always rarely gladly",
    "group": "children neighbours students tourists musicians players workers soldiers visitors customers",
    "topic": "history music weather football science politics cooking painting travel money chess gardening",
}
VOCABULARY = {key: words.split() for key, words in VOCABULARY.items()}

# {name} and {city} are keywords; every other slot is common vocabulary. About 10^10 sentences in all.
TEMPLATES = """{name} will meet {name} in {city} on {day} {part}
{name} and {name} will {verb} {name} next {day}
please call {name} before {hour} {minute} in the {part}
the {vehicle} from {city} to {city} leaves at {hour} {minute}
remind me to buy {count} {food} and a {adj} {thing}
the {adj} {animal} near the {place} belongs to {name}
{name} {past} a {adj} {thing} in {city} last {day}
is there a {vehicle} to {city} on {day} {part}
the {job} from {city} {past} {count} {adj} {animal} pictures
send the {adj} {thing} to {name} in {city}
we expect {weather} and {weather} in {city} on {day}
the {group} in the {place} talked about {topic} and {topic}
my {job} {adverb} {past} the {thing} behind the {place}
{name} told {name} a {adj} story about the {animal}
turn left at the {place} and follow the {adj} sign to {city}
{count} {group} waited for the {vehicle} in the {weather}
{name} the {job} would like to {verb} you on {day} at {hour}
can you {verb} {name} and the {job} from {city}
the {thing} in the {place} was {adj} and {adj}
{name} {adverb} {past} {count} {food} for the {group}
after the {weather} the {animal} ran through the {place}
book a table for {count} in {city} at {hour} {minute}
{name} wants to learn {topic} with {name} and {name}
the way from {city} over {city} to {city} takes {hour} hours
do not forget the {adj} {thing} on the {vehicle} to {city}
a {animal} and a {adj} {animal} sat under the {thing}
the {job} read a book about {topic} in the {adj} {place}
ask {name} if the {place} in {city} is open on {day}
{name} moved from {city} to {city} with a {animal} and {count} {thing}s
there are {count} {food} and {minute} {food} on the table
when will the {group} from {city} {verb} {name}
the price of the {thing} is {minute} {hour} dollars
{name} said the {adj} {vehicle} was late again
please play some {adj} music for {name} and the {group}
who {past} the {thing} that {name} left in the {place}
the {animal} {adverb} watched the {job} and the {group}
good {part} {name} this is {name} calling from {city}
write down {topic} for {day} and {topic} for {day}
the {adj} {place} of {city} has a {adj} {animal}
tell {name} {name} and {name} to come to {city}
{name} {name} and {name} took the {vehicle} to {city}
from {city} we went to {city} and {city} with {name}
{name} from {city} met {name} and {name} at the {place}
{name} likes {city} but {name} prefers {city} in the {weather}""".split("\n")
KEYWORD_TEMPLATES = [t for t in TEMPLATES if t.count("{name}") + t.count("{city}") >= 3]
# {*unit} is the unit said several times in a row: a genuine repetition, which a recogniser must not shorten.
REPEATS = """{*no} stop said {name}
{*wait} shouted {name} across the {place}
the clock went {*tick tock} and then stopped
the bell went {*ding dong} in {city}
it was {*very} {adj} in {city}
yes yes {*yes} said the {job}
count {*one} {hour} said {name}
the {animal} ran {*round and} round the {place}""".split("\n")

# (program, voice). SOURCE_VOICES: what supervised training hears. HELD_OUT: the target domain, an accent (Caribbean
# English) that it never hears, in four voices; a fifth of the recordings are in noise.
ACCENTS = "en-us en-gb en-gb-x-rp en-gb-x-gbclan en-us-nyc en-gb-scotland".split()
VARIANTS = """m1 m2 m3 m4 m5 m6 m7 f1 f2 f3 f4 f5 Andy Annie Gene Lee Michael Mike adam belinda benjamin caleb
david ed edward iven john kaukovalta linda max pablo paul rob robert steph travis""".split()
SOURCE_VOICES = [("espeak-ng", f"{ACCENTS[i % len(ACCENTS)]}+{v}") for i, v in enumerate(VARIANTS)]
SOURCE_VOICES += [("flite", "rms"), ("flite", "kal16")] * 4  # a fifth of the corpus
HELD_OUT = [("espeak-ng", f"en-029+{variant}") for variant in ("f3", "steph2", "robert", "klatt4")]


def sentence(rng, kind="any", repeats=(4, 8)):
    """One sentence of the grammar: (text, keywords).

    `kind`: "any"; "keywords" for three names or places or more; "repeat" for a genuine repetition, said
    `repeats` (fewest, most) times.
    """
    keywords = []

    def fill(slot):
        slot = slot[1]
        if slot.startswith("*"):
            return " ".join([slot[1:]] * int(rng.integers(repeats[0], repeats[1] + 1)))
        if slot not in ("name", "city"):
            return str(rng.choice(VOCABULARY[slot]))
        pool = NAMES if slot == "name" else PLACES
        keywords.append(pool[int(len(pool) * rng.random() ** 1.6)])  # the last of each list are rare, as names are
        return keywords[-1]

    template = str(rng.choice({"any": TEMPLATES, "keywords": KEYWORD_TEMPLATES, "repeat": REPEATS}[kind]))
    return re.sub(r"{(.*?)}", fill, template), sorted(set(keywords))


def keywords_in(text):
    """The names and places in a sentence of the grammar, as `sentence` lists them."""
    return sorted(set(text.split()) & set(NAMES + PLACES))


def reserved(text):
    """Whether a sentence is kept for RL pools and tests: one in eight, by its checksum. Training never says it."""
    return zlib.crc32(text.encode()) % 8 == 0


def unique_sentences(rng, count, taken, kind="any", repeats=(4, 8), held_out=True):
    """`count` different (text, keywords), none of whose texts is in the set `taken`; they are added to it."""
    found = []
    while len(found) < count:
        text, keywords = sentence(rng, kind, repeats)
        if text not in taken and reserved(text) == held_out:
            taken.add(text)
            found.append((text, keywords))
    return found


def paragraph(sentences):
    """Several (text, keywords) read in one go: (text with full stops for the pauses, keywords)."""
    texts, keywords = zip(*sentences)
    return ". ".join(texts), sorted({k for ks in keywords for k in ks})


def speak(text, voice, rng):
    """`text` in `voice` (program, name): float32 waveform (samples,) at 16 kHz, peak 0.3 to 0.9.

    Rate and pitch vary with `rng`. Raises RuntimeError when the synthesiser fails.
    """
    program, name = voice
    if program == "espeak-ng":
        rate, pitch = int(rng.integers(140, 195)), int(rng.integers(35, 66))  # words a minute; 0 to 99
        command = ["espeak-ng", "-v", name, "-s", str(rate), "-p", str(pitch), "--stdout", text]
    else:
        stretch = f"duration_stretch={rng.uniform(0.85, 1.15):.2f}"
        command = ["flite", "-voice", name, "--setf", stretch, "-t", text, "-o", "/dev/stdout"]
    done = subprocess.run(command, capture_output=True)
    if done.returncode or len(done.stdout) < 1000:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.decode(errors='replace').strip()}")
    # Both write a WAV header with an unknown or wrong length to a pipe: read the samples ourselves.
    rate = int.from_bytes(done.stdout[24:28], "little")
    wave = np.frombuffer(done.stdout[44:44 + (len(done.stdout) - 44) // 2 * 2], np.int16).astype(np.float32) / 32768
    wave = torchaudio.functional.resample(torch.from_numpy(wave), rate, SAMPLE_RATE).numpy()
    return wave / max(np.abs(wave).max(), 1e-4) * rng.uniform(0.3, 0.9)


def noise(rng, samples, kind):
    """`samples` of one kind of noise at unit power: float32.

    "white", "pink", "brown", "hum" (mains and its harmonics), "rumble" (slowly modulated pink),
    "tones" (chords, like music), "clicks", "silence" (next to nothing).
    """
    time = np.arange(samples) / SAMPLE_RATE
    if kind in ("white", "pink", "brown", "rumble"):
        slope = {"white": 0.0, "pink": 0.5, "brown": 1.0, "rumble": 0.7}[kind]
        spectrum = np.fft.rfft(rng.standard_normal(samples))
        out = np.fft.irfft(spectrum / np.maximum(np.arange(len(spectrum)), 1) ** slope, samples)
        if kind == "rumble":
            out = out * (1.1 + np.sin(2 * np.pi * rng.uniform(0.5, 4) * time + rng.uniform(0, 6)))
    elif kind == "hum":
        base = rng.choice([50, 60])
        out = sum(rng.uniform(0, 1) * np.sin(2 * np.pi * base * h * time + rng.uniform(0, 6)) for h in range(1, 12))
    elif kind == "tones":
        out = np.zeros(samples)
        start = 0
        while start < samples:
            stop = min(samples, start + int(rng.uniform(0.15, 0.6) * SAMPLE_RATE))
            t = time[: stop - start]
            root = 110 * 2 ** (rng.integers(0, 30) / 12)
            for semitones in ([0, 4, 7], [0, 3, 7], [0, 5, 9], [0])[rng.integers(4)]:
                for harmonic in (1, 2, 3, 4):
                    hertz = root * 2 ** (semitones / 12) * harmonic
                    out[start:stop] += np.exp(-4 * t) / harmonic * np.sin(2 * np.pi * hertz * t)
            start = stop
    elif kind == "clicks":
        out = np.zeros(samples)
        for _ in range(max(2, int(rng.uniform(2, 9) * samples / SAMPLE_RATE))):
            at = rng.integers(0, max(1, samples - 400))
            burst = rng.standard_normal(min(400, samples - at)) * np.exp(-np.arange(min(400, samples - at)) / 60)
            out[at:at + len(burst)] += burst
        out += 0.01 * rng.standard_normal(samples)
    elif kind == "silence":
        return (1e-4 * rng.standard_normal(samples)).astype(np.float32)
    else:
        raise ValueError(f"unknown kind of noise {kind!r}")
    return (out / (np.sqrt(np.mean(out ** 2)) + 1e-9)).astype(np.float32)


def add_noise(wave, snr_db, rng, kind):
    """`wave` with noise at `snr_db` (signal power over noise power, dB), rescaled if it would clip."""
    power = np.mean(wave ** 2)
    mixed = wave + noise(rng, len(wave), kind) * np.sqrt(power / 10 ** (snr_db / 10))
    return (mixed / max(1.0, np.abs(mixed).max() / 0.95)).astype(np.float32)


def write_set(folder, rows, waves):
    """One folder in AudioFolder form: audio/NNNN.ogg (Opus) and metadata.jsonl."""
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    for old in (folder / "audio").glob("*.ogg"):
        old.unlink()
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as out:
        for i, ((text, _, keywords, voice, snr, kind, _), wave) in enumerate(zip(rows, waves)):
            name = f"audio/{i:04d}.ogg"
            sf.write(folder / name, wave, SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=0.93)
            out.write(json.dumps({"file_name": name, "text": text, "keywords": keywords,
                                  "voice": voice[1] if voice else kind,
                                  "snr_db": None if snr is None else round(snr, 1)}) + "\n")
