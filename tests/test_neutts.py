"""NeuTTS and NeuCodec, small and random, through chapter 2: other prompts and tokens, a codec that speaks at 24 kHz."""
import argparse
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf

import grpo_tts
from engine import speech
from engine.audio import DataError
from engine.judges import Codec
from tools import use

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a policy and of a codec with 4,096 codes, 50 a second."""
    folder = tmp_path_factory.mktemp("neutts")
    shutil.copytree("checkpoints/tts", folder / "tts", ignore=shutil.ignore_patterns("*.safetensors", "config.json",
                                                                                     "chat_template*"))
    for path in (folder / "tts").glob("*.json"):                    # the embedded tokenizer, its speech tokens renamed
        path.write_text(path.read_text(encoding="utf-8").replace("<|s_", "<|speech_"))
    tokenizer = hf.AutoTokenizer.from_pretrained(folder / "tts")
    tokenizer.chat_template = None
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|TEXT_PROMPT_START|>", "<|TEXT_PROMPT_END|>"]},
                                 replace_extra_special_tokens=False)
    tokenizer.save_pretrained(folder / "tts")
    torch.manual_seed(0)
    hf.Qwen2ForCausalLM(hf.Qwen2Config(
        vocab_size=len(tokenizer) + 3, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2048, initializer_range=0.3)).save_pretrained(folder / "tts")
    ears = dict(model_type="wav2vec2-bert", hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                intermediate_size=64, feature_projection_input_dim=160, conv_depthwise_kernel_size=3)
    hf.NeuCodecModel(hf.NeuCodecConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, encoder_hidden_size=2, quantization_dim=64, quantization_levels=[4] * 6,
        semantic_model_config=ears)).save_pretrained(folder / "codec")
    hf.NeuCodecFeatureExtractor().save_pretrained(folder / "codec")
    return folder / "tts", folder / "codec"


@pytest.fixture
def spelt(monkeypatch):
    """Phonemes that need no espeak-ng: the text itself between strokes."""
    stand_in = argparse.Namespace(phonemize=lambda texts: [f"/{text}/ " for text in texts])
    monkeypatch.setattr(speech, "espeak", lambda: stand_in)


def test_neucodec_gives_the_judges_what_they_hear(models):
    """320 samples a token at 16 kHz where it decodes 480 at 24; the longest of a batch is what it is alone."""
    codec = Codec(str(models[1]), CPU)
    assert (codec.rate, codec.spoken_rate, codec.hop) == (16_000, 24_000, 320)
    assert (codec.tokens_per_s, codec.count) == (50, 4096)
    seconds = [np.random.default_rng(i).standard_normal(16_000 * i).astype(np.float32) * 0.1 for i in (1, 2)]
    codes = codec.encode(seconds)
    assert all(abs(len(c) - 50 * i) <= 1 and c.max() < 4096 for i, c in zip((1, 2), codes))
    with torch.inference_mode():
        whole = codec.model.decode(torch.from_numpy(codes[1])[None, None]).audio_values
    assert whole.shape[-1] == 480 * len(codes[1])
    waves = codec.decoder_only().decode(codes)
    assert [len(w) for w in waves] == [320 * len(c) for c in codes]
    assert np.allclose(waves[1], codec.decode(codes[1:])[0], atol=1e-5)
    peak = lambda wave, rate: np.abs(np.fft.rfft(wave))[:int(4000 * len(wave) / rate)].argmax() / len(wave) * rate  # noqa: E731
    assert peak(waves[1], 16_000) == pytest.approx(peak(whole[0, 0].numpy(), 24_000), abs=2)      # the pitch is kept


def test_the_prompt_is_that_of_neutts(models, spelt):
    tokenizer = hf.AutoTokenizer.from_pretrained(models[0])
    tokenizer.padding_side = "left"
    voices = [speech.Voice("a", "hello", [5, 4095], None), speech.Voice("b", "one two three", [7], None)]
    asked = speech.prompt_ids(tokenizer, ["anna met peter", "yes"], voices)
    said = tokenizer.decode(asked.input_ids[0][asked.attention_mask[0].bool()])
    assert said == ("user: Convert the text to speech:<|TEXT_PROMPT_START|>/hello/ /anna met peter/<|TEXT_PROMPT_END|>"
                    "\nassistant:<|SPEECH_GENERATION_START|><|speech_5|><|speech_4095|>")
    ends = tokenizer.convert_tokens_to_ids(["<|speech_4095|>", "<|speech_7|>"])
    assert asked.input_ids[:, -1].tolist() == ends                             # one token each, padded on the left


@pytest.mark.skipif(not importlib.util.find_spec("phonemizer") or not shutil.which("espeak-ng"),
                    reason="needs phonemizer and espeak-ng")
def test_phonemes_keep_stress_and_punctuation():
    assert speech.phonemes("Yes,  it is.") == "jˈɛs, ɪɾ ˈɪz."


def test_two_steps_of_the_script_then_merge(models, spelt, tmp_path, capsys):
    texts = tmp_path / "texts.txt"
    texts.write_text("anna met peter in rome\n")
    flags = ["--device", "cpu", "--model", models[0], "--codec", models[1], "--dev", texts, "--test", texts, "--batch",
             "2", "--group", "2", "--micro", "2", "--max-seconds", "2", "--steps", "2", "--out", tmp_path / "run",
             "--lr", "1e-2"]
    grpo_tts.main([*map(str, flags), "--rewards", "R1,R3"])
    said = capsys.readouterr().out
    assert "check: |ratio - 1|" in said and "log pi_ref| 0.0e+00" in said and "in 2 steps" in said
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "reward" in row]
    assert len(rows) == 2 and rows[0]["kl"] == 0 < rows[1]["kl"] and rows[0]["speech_s"] > 0.5
    use.main(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged")])
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(merged).__name__ == "Qwen2ForCausalLM"
    assert (Path(tmp_path / "run/samples/01-after.wav")).stat().st_size > 1000


def test_another_language_is_refused(models):
    with pytest.raises(DataError, match="NeuTTS is driven in English alone"):
        speech.load(grpo_tts.parse_args(["--device", "cpu", "--model", str(models[0]), "--language", "de"]), CPU)


def test_without_phonemizer_a_line_says_what_to_install_before_the_weights_load(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "phonemizer.backend", None)
    monkeypatch.setattr(speech, "AutoModelForCausalLM", None)
    speech.espeak.cache_clear()
    with pytest.raises(DataError, match="pip install phonemizer, and install espeak-ng"):
        speech.load(grpo_tts.parse_args(["--device", "cpu", "--model", str(models[0])]), CPU)
