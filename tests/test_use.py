"""From a run to plain transformers, to transcripts and to sound: with adapters made by hand, and nothing trained."""
import json

import numpy as np
import pytest
import soundfile as sf
import torch
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor, AutoTokenizer

import grpo_asr
import grpo_tts
from data import load_folder
from engine import speech
from engine.judges import Judge
from rewards import asr_accuracy
from tools import use

CPU = torch.device("cpu")
CLIPS = load_folder("data/test/open")
SOURCE = [CLIPS[39], CLIPS[45]]                                    # which the policy reads as they were said
TEXT = "have you got a minute to spare"


def run_of(folder, script, load, strength, *flags):
    """A run's folder: a log with its arguments, and adapters that are random numbers of that size."""
    args = script.parse_args(["--device", "cpu", *flags])
    args.quantize, asked = "none", args.quantize
    processor, policy = load(args, CPU)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, strength, generator=generator)
    policy.save_pretrained(folder / "adapter")
    args.quantize = asked
    (folder / "log.jsonl").write_text(json.dumps({"arguments": vars(args), "seed": 1}) + "\n")
    return folder, processor, policy


@pytest.fixture(scope="module")
def asr_run(tmp_path_factory):
    """An 8-bit run whose adapters change what is heard."""
    return run_of(tmp_path_factory.mktemp("asr"), grpo_asr, grpo_asr.load, 0.1, "--quantize", "8bit")


@pytest.fixture(scope="module")
def tts_run(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("tts"), grpo_tts, speech.load, 0.01)


def said(capsys, *argv):
    use.main([str(a) for a in argv])
    return capsys.readouterr().out.strip()


def failure(*argv):
    with pytest.raises(SystemExit) as stopped:
        use.main([str(a) for a in argv])
    message = str(stopped.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


def same_logits(policy, merged, inputs):
    """The merged model's logits are those of the adapter switched on, and not those of it switched off."""
    with torch.no_grad():
        on, alone = policy(**inputs).logits, merged(**inputs).logits
        with policy.disable_adapter():
            off = policy(**inputs).logits
    torch.testing.assert_close(alone, on, rtol=1e-3, atol=1e-3)
    assert (on - off).abs().max() > 0.1


def test_a_merged_recogniser_is_the_adapter_on_its_base(asr_run, tmp_path, capsys):
    folder, _, policy = asr_run
    lines = said(capsys, "merge", folder, "--out", tmp_path / "whole", "--dtype", "float32")
    names = {}
    exec(lines.split(":\n")[1], names)                          # what it says loads it
    processor, merged = names["processor"], names["model"].eval()
    assert merged.dtype == torch.float32 and not getattr(merged, "is_quantized", False)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert merged.generation_config.eos_token_id == policy.get_base_model().generation_config.eos_token_id
    same_logits(policy, merged, processor.apply_transcription_request(SOURCE[0].waveform(16_000), language="en"))
    # the default is the base's own precision, rounded once
    said(capsys, "merge", folder, "--out", tmp_path / "stored")
    stored = AutoModelForMultimodalLM.from_pretrained(tmp_path / "stored").state_dict()
    assert all(torch.equal(weight, merged.state_dict()[name].to(torch.bfloat16)) for name, weight in stored.items()
               if weight.is_floating_point())
    again = AutoProcessor.from_pretrained(tmp_path / "stored")
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()


def test_a_merged_speaker_is_the_adapter_on_its_base(tts_run, tmp_path, capsys):
    folder, tokenizer, policy = tts_run
    assert "AutoModelForCausalLM" in said(capsys, "merge", folder, "--out", tmp_path / "m", "--dtype", "float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    voice = speech.Voice("x", "hello", list(range(20)), None)
    inputs = speech.prompt_ids(AutoTokenizer.from_pretrained(tmp_path / "m"), [TEXT], [voice])
    assert inputs.input_ids.tolist() == speech.prompt_ids(tokenizer, [TEXT], [voice]).input_ids.tolist()
    same_logits(policy, merged, {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask})


def test_a_clip_is_transcribed_as_its_text_at_any_rate(tmp_path, capsys):
    wave = SOURCE[0].waveform(16_000)
    sf.write(tmp_path / "stereo.flac", np.repeat(np.stack([wave, wave], 1), 3, axis=0), 48_000)
    one = said(capsys, "transcribe", "checkpoints/asr", SOURCE[0].path, "--device", "cpu")
    assert one == SOURCE[0].text
    both = said(capsys, "transcribe", "checkpoints/asr", SOURCE[1].path, tmp_path / "stereo.flac", "--device", "cpu")
    assert both.splitlines() == [f"{SOURCE[1].path}: {SOURCE[1].text}", f"{tmp_path / 'stereo.flac'}: {SOURCE[0].text}"]


def test_a_run_transcribes_with_its_adapter(asr_run, tmp_path, capsys):
    folder = tmp_path / "run"                                   # as it was trained, but not quantised
    (folder / "adapter").mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / "adapter" / name).write_bytes((asr_run[0] / "adapter" / name).read_bytes())
    header = json.loads((asr_run[0] / "log.jsonl").read_text(encoding="utf-8"))
    header["arguments"] |= {"quantize": "none", "model": "moved/away"}
    (folder / "log.jsonl").write_text(json.dumps(header) + "\n")
    assert "moved/away" in failure("transcribe", folder, SOURCE[0].path)
    files = [u.path for u in SOURCE]
    heard = said(capsys, "transcribe", folder, *files, "--base", "checkpoints/asr", "--device", "cpu")
    said(capsys, "merge", folder, "--out", tmp_path / "m", "--dtype", "float32", "--base", "checkpoints/asr")
    assert heard == said(capsys, "transcribe", tmp_path / "m", *files, "--device", "cpu")
    assert heard != "\n".join(f"{u.path}: {u.text}" for u in SOURCE)


def test_an_8bit_run_transcribes_as_it_was_trained(asr_run, capsys, monkeypatch):
    asked, real = [], grpo_asr.load
    monkeypatch.setattr(grpo_asr, "load", lambda args, device: asked.append(args.quantize) or real(args, device))
    assert said(capsys, "transcribe", asr_run[0], SOURCE[0].path, "--device", "cpu") and asked == ["8bit"]


def test_a_text_becomes_a_wav_that_a_recogniser_reads(tts_run, tmp_path, capsys):
    out = tmp_path / "new" / "a.wav"
    given = ["--voice", "slt", "--device", "cpu"]
    line = said(capsys, "speak", "checkpoints/tts", TEXT, *given, "--out", out)
    wave, rate = sf.read(out, dtype="float32")
    assert rate == 16_000 and 1 < len(wave) / rate < 5 and np.abs(wave).max() > 0.05
    assert line == f"{len(wave) / rate:.2f} s in {out}"
    assert asr_accuracy(TEXT, Judge("checkpoints/asr", CPU).transcribe([wave])[0]) >= 0.6
    again = {name: tmp_path / f"{name}.wav" for name in ("same", "seed", "voice", "cold", "run")}
    said(capsys, "speak", "checkpoints/tts", TEXT, *given, "--out", again["same"], "--seed", "1")
    said(capsys, "speak", "checkpoints/tts", TEXT, *given, "--out", again["seed"], "--seed", "2")
    said(capsys, "speak", "checkpoints/tts", TEXT, "--voice", "kal16", "--device", "cpu", "--out", again["voice"])
    said(capsys, "speak", "checkpoints/tts", TEXT, *given, "--out", again["cold"], "--temperature", "0")
    said(capsys, "speak", tts_run[0], TEXT, *given, "--out", again["run"])
    sounds = {name: path.read_bytes() for name, path in again.items()}
    assert sounds.pop("same") == out.read_bytes() and len({out.read_bytes(), *sounds.values()}) == 5


def test_a_mistake_gets_one_line(asr_run, tts_run, tmp_path):
    clip, out = SOURCE[0].path, tmp_path / "x.wav"
    assert "nowhere: no run there" in failure("merge", "nowhere", "--out", tmp_path / "m")
    assert "no run there" in failure("merge", "checkpoints/asr", "--out", tmp_path / "m")
    assert "is there already and not empty" in failure("merge", asr_run[0], "--out", asr_run[0])
    assert "runs/none: no such folder" in failure("transcribe", "runs/none", clip)
    assert "error: nowhere: no such folder" in failure("transcribe", "nowhere", clip)
    assert "comes with a TokenizersBackend" in failure("transcribe", "checkpoints/tts", clip, "--device", "cpu")
    assert "no speech tokens" in failure("speak", "checkpoints/asr", TEXT, "--out", out, "--device", "cpu")
    assert "is a run of TTS; python -m tools.use speak" in failure("transcribe", tts_run[0], clip)
    assert "is a run of speech recognition" in failure("speak", asr_run[0], TEXT, "--out", out)
    assert "cannot be read as audio" in failure("transcribe", "checkpoints/asr", "README.md")
    assert "none.wav: no such file" in failure("transcribe", "checkpoints/asr", clip, "none.wav")
    assert "over --max-seconds 1" in failure("transcribe", "checkpoints/asr", clip, "--max-seconds", 1)
    assert "no word in it" in failure("speak", "checkpoints/tts", "?!", "--out", out)
    assert "--voice bob: data/tts/voices has slt," in failure(
        "speak", "checkpoints/tts", TEXT, "--out", out, "--voice", "bob")
    assert "ends in .wav" in failure("speak", "checkpoints/tts", TEXT, "--out", tmp_path / "x.txt")
    assert "did not end within --max-seconds 1" in failure(
        "speak", "checkpoints/tts", TEXT, "--out", out, "--max-seconds", 1, "--device", "cpu")
    assert not out.exists() and not (tmp_path / "m").exists()


def test_a_run_that_is_damaged_is_named(asr_run, tts_run, tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n')
    assert "readable log.jsonl with its arguments" in failure("merge", tmp_path, "--out", tmp_path / "m")
    log.write_text((asr_run[0] / "log.jsonl").read_text(encoding="utf-8"))
    assert "a run without an adapter" in failure("merge", tmp_path, "--out", tmp_path / "m")
    (tmp_path / "adapter").mkdir()
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes((asr_run[0] / "adapter" / weights.name).read_bytes()[:1000])
    assert "is damaged" in failure("merge", tmp_path, "--out", tmp_path / "m")
    weights.write_bytes((tts_run[0] / "adapter" / weights.name).read_bytes())
    assert "of 56 weights are there" in failure("merge", tmp_path, "--out", tmp_path / "m")
    weights.write_bytes((asr_run[0] / "adapter" / weights.name).read_bytes())
    assert "or was not made for checkpoints/asr2: --base names another" in failure(
        "merge", tmp_path, "--out", tmp_path / "m", "--base", "checkpoints/asr2")
    assert not (tmp_path / "m").exists()
