"""measure.py: models of real size are built, go through the scripts, and leave a line with their seconds and memory."""
import importlib.util
import json

import pytest

from tools import measure, peer


def thin(config_class, **less):
    """`config_class` with fewer and narrower layers: what is built stays the same in kind."""
    return lambda **given: config_class(**{**given, **less})


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The published configurations, thinned; vocabulary, codes and rates stay."""
    layer = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=1)
    llm = dict(**layer, num_key_value_heads=1, head_dim=64, initializer_range=0.2)
    thinned = {
        "FunAsrNanoConfig": dict(
            text_config=dict(model_type="qwen3", vocab_size=151_936, tie_word_embeddings=True, **llm),
            audio_config=dict(model_type="fun_asr_nano_encoder", num_timestamp_prediction_layers=0, **layer),
            adaptor_config=dict(hidden_size=64, intermediate_size=16, num_attention_heads=1)),
        "LlamaConfig": llm,
        "WavLMConfig": {**layer, "num_attention_heads": 4},
        "Xcodec2Config": dict(
            **layer, num_key_value_heads=1, quantization_dim=128, encoder_hidden_size=2,
            semantic_model_config=dict(model_type="wav2vec2-bert", **layer))}
    for name, less in thinned.items():
        monkeypatch.setattr(measure.hf, name, thin(getattr(measure.hf, name), **less))
    monkeypatch.setattr(measure, "REAL", tmp_path / "real")
    return tmp_path


def measured(folder, *flags):
    """The line that a measurement leaves."""
    measure.main([*flags, "--size", "real", "--steps", "2", "--log", str(folder / "log.jsonl"), "--device", "cpu"])
    return json.loads((folder / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])


def test_a_recogniser_of_real_size_is_built_once_and_timed(small, capsys):
    flags = ["grpo_asr", "--batch", "2", "--group", "2", "--micro", "4", "--max-tokens", "5"]
    row = measured(small, *flags)
    assert set(row["seconds"]) == {"encode", "rollout", "reward", "update"} and row["peak_gib"] > 0
    assert capsys.readouterr().out.count("build ") == 3
    row = measured(small, *flags, "--seconds", "3")                          # the model is there already
    assert capsys.readouterr().out.count("build ") == 2 and row["flags"].endswith("--seconds 3")


def test_a_speaker_of_real_size_says_speech_tokens(small):
    row = measured(small, "grpo_tts", "--batch", "2", "--group", "2", "--micro", "4", "--max-seconds", "1", "--offload",
                   "--quantize", "8bit")
    assert set(row["seconds"]) == {"rollout", "decode", "reward", "update"}
    assert set(row["peak_by_phase_gib"]) >= {"rollout", "decode", "reward", "update"}
    log = [json.loads(line) for line in open("runs/measure/log.jsonl")]
    assert log[2]["tokens"] > 40                          # of 50: speech is what the random LLM says


def test_the_limit_is_what_is_read_and_multiplied():
    import torch
    from transformers import AutoModelForCausalLM

    from engine.models import add_adapters
    llm = AutoModelForCausalLM.from_pretrained("checkpoints/tts", dtype=torch.float32)
    layers = sum(w.numel() for name, w in llm.named_parameters() if w.dim() == 2 and "embed" not in name)
    head, cache = llm.lm_head.weight.numel(), 4 * sum(
        2 * w.shape[0] for name, w in llm.named_parameters() if "k_proj" in name)      # bytes of a position's k and v
    policy = add_adapters(llm, "", 2, 1)
    read = measure.limit(policy, (2, 30), (8, 20), bandwidth=1.0, flops=1e30)          # reading is all that costs
    assert read["rollout"] == pytest.approx(20 * (4 * (layers + head) + 8 * (30 + 10) * cache))
    done = measure.limit(policy, (2, 30), (8, 20), bandwidth=1e30, flops=1.0)          # multiplying is
    assert done["rollout"] == pytest.approx(2 * (2 * 30 + 8 * 20) * layers + 2 * 8 * 20 * head)
    assert done["update"] == pytest.approx(6 * ((2 * 30 + 8 * 20) * layers + 8 * 20 * head))


def test_what_does_not_fit_is_reported_in_the_scripts_own_words(small, monkeypatch):
    import torch

    import grpo_asr
    def full(args):
        raise torch.cuda.OutOfMemoryError("full")
    monkeypatch.setattr(grpo_asr, "train", full)
    row = measured(small, "grpo_asr", "--micro", "8")
    assert "memory is full; lower --micro (now 8) or --group" in row["failed"] and "seconds" not in row


@pytest.mark.skipif(importlib.util.find_spec("trl") is not None, reason="TRL is installed")
def test_a_peer_that_is_not_installed_is_named():
    with pytest.raises(SystemExit, match="is not installed: pip install trl"):
        peer.main(["--steps", "2"])


@pytest.mark.parametrize("flags, message", [("diffro_tts --size real", "no Token2Text"),
                                            ("grpo_asr --steps 1", "half of them"),
                                            ("grpo_tts --size real --seconds 20", "--max-seconds"),
                                            ("grpo_asr --seconds 20", "--size real")])
def test_what_cannot_be_measured_is_said(flags, message, capsys):
    with pytest.raises(SystemExit):
        measure.parse_args(flags.split())
    assert message in capsys.readouterr().err
