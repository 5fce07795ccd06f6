"""Shared by all tests: the embedded models, loaded once, and some of their data."""
import contextlib
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")       # models this small gain nothing from a second, and wait for it
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)

import pytest
import torch

import grpo_asr
import grpo_tts
from data import load_sentences, read_line
from engine import speech
from engine.run import quiet

CPU = torch.device("cpu")


def load_policy(*flags):
    """(args, processor, policy) of a recogniser on the CPU, the embedded one unless the flags name another."""
    args = grpo_asr.parse_args(["--device", "cpu", *flags])
    quiet()
    return args, *grpo_asr.load(args, CPU)


def move_adapters(policy, size):
    """Takes the adapters off zero, so that policy and reference differ."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, size, generator=generator)


def first(count, folder):
    """The first utterances of a folder; the others are not decoded."""
    lines = Path(folder, "metadata.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    return [read_line(Path(folder), line, 16_000, 0) for line in lines]


@contextlib.contextmanager
def untrained(policy):
    """The policy as it was before its adapters were moved."""
    weights = {name: weight.clone() for name, weight in policy.state_dict().items() if "lora_B" in name}
    policy.load_state_dict({name: torch.zeros_like(weight) for name, weight in weights.items()}, strict=False)
    yield
    policy.load_state_dict(weights, strict=False)


@pytest.fixture(scope="session")
def recogniser():
    """(args, processor, policy) with adapters moved off zero."""
    args, processor, policy = load_policy()
    move_adapters(policy, 0.02)
    return args, processor, policy


@pytest.fixture(scope="session")
def eight_bit():
    """(args, processor, policy) of the embedded recogniser in 8 bits, its adapters at zero."""
    return load_policy("--quantize", "8bit")


@pytest.fixture(scope="session")
def clips():
    """Utterances of d0 with words in them."""
    return [u for u in first(20, "data/d0") if u.text][:16]


@pytest.fixture(scope="session")
def speaking():
    """(Studio of the embedded models, its adapters moved off zero; ten recordings, and their codes)."""
    args = grpo_tts.parse_args(["--device", "cpu"])
    quiet()
    tokenizer, policy = speech.load(args, CPU)
    codec, *judges = speech.load_judges(args, CPU)
    recordings = [u.waveform(codec.rate) for u in first(10, "data/tts/test/plain")]
    codes = codec.encode(recordings)                            # before the encoder is dropped
    voices = speech.load_voices(args, codec, judges[-1])
    tests = speech.cast(load_sentences("data/tts/test/plain")[:4][::-1], voices)
    move_adapters(policy, 0.003)
    code = speech.speech_tokens(tokenizer, codec, policy.config.vocab_size)
    return speech.Studio(args, tokenizer, policy, codec, *judges, None, code, voices, tests,
                         {"plain": tests}), recordings, codes


@pytest.fixture
def loaded_once(speaking, monkeypatch):
    """Chapters 2 and 3 judge with the models that are loaded already, as long as their flags ask for no others."""
    studio, load_judges, load_voices = speaking[0], speech.load_judges, speech.load_voices
    names = ("codec", "judge", "second_judge", "speaker", "voices", "language", "offload")
    same = lambda args: all(getattr(args, name) == getattr(studio.args, name) for name in names)  # noqa: E731

    def judges(args, device, first=True):
        found = (studio.codec, studio.judge if first else None, studio.second, studio.speaker)
        return found if same(args) else load_judges(args, device, first)

    monkeypatch.setattr(speech, "load_judges", judges)
    monkeypatch.setattr(speech, "load_voices",
                        lambda args, *given: studio.voices if same(args) else load_voices(args, *given))
