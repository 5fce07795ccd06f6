"""Every class of recognisers.py through the script's own lines: Fun-ASR-Nano as the embedded recogniser, the others
as tiny random models in ordinary folders, with the real processors but small chat templates and tokenizers of our own.
"""
import base64
import copy
import json
import re
from dataclasses import replace

import pytest
import torch
import transformers
from bitsandbytes.nn import Linear8bitLt
from conftest import CPU, load_policy, move_adapters, untrained
from peft import LoraConfig
from test_policy import close, logprobs, rollout_of
from tokenizers.pre_tokenizers import ByteLevel

import grpo_asr
from engine.audio import DataError
from engine.judges import Judge
from engine.models import load_recogniser, mend_attention
from engine.recognisers import RECOGNISERS, collate, embed
from engine.sampling import Prompts, Rollout, causal, completion_logprobs, completion_mask, prefill
from grpo_asr import decode, encode, end_tokens, grpo_loss, transcripts_as_rollout

POLICIES = [kind for kind, row in RECOGNISERS.items() if row.hear]
PAD, END, START = "<|endoftext|>", "<|im_end|>", "<|im_start|>"
CHAT = """{%- for m in messages -%}<|im_start|>{{ m.role }}\n{%- if m.content is string -%}{{ m.content }}{%- else -%}
{%- for p in m.content -%}{%- if p.type == 'audio' -%}AUDIO{%- elif p.type == 'keywords' -%}{{ p.keywords | join(' ') }}
{%- else -%}{{ p.text or p.language }}{%- endif -%}{%- endfor -%}{%- endif -%}
{%- if not (loop.last and m.role == 'assistant') -%}<|im_end|>{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"""


# ---- tiny models ----------------------------------------------------------------------------------------------

def byte_tokenizer(*special, **named):
    """A Qwen2Tokenizer of bytes, the special tokens at its end; `<asr_text>` is an ordinary token, as in Qwen3-ASR."""
    vocab = {letter: i for i, letter in enumerate([*sorted(ByteLevel.alphabet()), PAD, END, START, *special])}
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=vocab, merges=[], pad_token=PAD, eos_token=END,
        extra_special_tokens=named or [START, *special])
    tokenizer.add_tokens(["<asr_text>"])
    return tokenizer


def mels(**more):
    return transformers.WhisperFeatureExtractor(feature_size=16, **more)


def tekken(folder):
    """A tekken.json of bytes, its special tokens where Voxtral has them: [AUDIO] 24, [BEGIN_AUDIO] 25."""
    names = dict(enumerate(
        "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] "
        "[TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] "
        "[TOOL_CONTENT] [ARGS] [CALL_ID]".split())) | {24: "[AUDIO]", 25: "[BEGIN_AUDIO]", 34: "[TRANSCRIBE]"}
    special = [dict(rank=i, token_str=names.get(i, f"<SPECIAL_{i}>"), is_control=True) for i in range(40)]
    vocab = [dict(rank=i, token_bytes=base64.b64encode(bytes([i])).decode(), token_str=None) for i in range(256)]
    (folder / "tekken.json").write_text(json.dumps({
        "config": dict(pattern=r"[^\s]+|\s+", num_vocab_tokens=256, default_vocab_size=296,
                       default_num_special_tokens=40, version="v7"),
        "vocab": vocab, "special_tokens": special,
        "audio": dict(sampling_rate=16_000, frame_rate=12.5, chunk_length_s=30.0,
                      audio_encoding_config=dict(num_mel_bins=16, hop_length=160, window_size=400))}))


def llm(model_type, tokenizer, **more):
    return dict(model_type=model_type, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
                num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16, bos_token_id=None,
                max_position_embeddings=4096, eos_token_id=tokenizer.convert_tokens_to_ids(END),
                pad_token_id=tokenizer.convert_tokens_to_ids(PAD), **more)


def whisper_tower(**more):
    return dict(d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64, num_mel_bins=16, **more)


def parts(kind, folder):
    """(processor, config) of a tiny model."""
    if kind == "Qwen3ASR":
        tokenizer = byte_tokenizer("<|audio_pad|>", "<|audio_start|>", "<|audio_end|>", audio_token="<|audio_pad|>",
                                   audio_bos_token="<|audio_start|>", audio_eos_token="<|audio_end|>")
        chat = CHAT.replace("AUDIO", "<|audio_start|><|audio_pad|><|audio_end|>")
        return (transformers.Qwen3ASRProcessor(transformers.Qwen3ASRFeatureExtractor(feature_size=16), tokenizer, chat),
                transformers.Qwen3ASRConfig(
                    audio_config=dict(model_type="qwen3_asr_encoder", output_dim=32, downsample_hidden_size=8,
                                      **whisper_tower()),
                    text_config=llm("qwen3", tokenizer),
                    audio_token_id=tokenizer.convert_tokens_to_ids("<|audio_pad|>"),
                    pad_token_id=tokenizer.pad_token_id, eos_token_id=[tokenizer.eos_token_id]))
    if kind == "GlmAsr":
        tokenizer = byte_tokenizer("<|pad|>")
        return (transformers.GlmAsrProcessor(mels(), tokenizer, CHAT.replace("AUDIO", "<|pad|>")),
                transformers.GlmAsrConfig(
                    audio_config=dict(model_type="glmasr_encoder", hidden_size=32, intermediate_size=128,
                                      num_hidden_layers=2, num_attention_heads=2, num_mel_bins=16),
                    text_config=llm("llama", tokenizer),
                    audio_token_id=tokenizer.convert_tokens_to_ids("<|pad|>")))
    if kind == "GraniteSpeech":
        tokenizer = byte_tokenizer("<|audio|>")
        tokenizer.chat_template = CHAT
        return (transformers.GraniteSpeechProcessor(transformers.GraniteSpeechFeatureExtractor(), tokenizer),
                transformers.GraniteSpeechConfig(
                    encoder_config=dict(num_layers=2, hidden_dim=32, num_heads=2, output_dim=8, context_size=20,
                                        max_pos_emb=64, conv_kernel_size=5),
                    projector_config=dict(model_type="blip_2_qformer", hidden_size=32, num_hidden_layers=1,
                                          num_attention_heads=2, intermediate_size=64, encoder_hidden_size=32,
                                          cross_attention_frequency=1, use_qformer_text_input=False),
                    text_config=llm("granite", tokenizer, logits_scaling=2.0, embedding_multiplier=3.0,
                                    attention_multiplier=0.25, residual_multiplier=0.5),
                    audio_token_index=tokenizer.convert_tokens_to_ids("<|audio|>")))
    if kind == "Voxtral":
        pytest.importorskip("mistral_common")
        tekken(folder)
        tokenizer = transformers.MistralCommonBackend.from_pretrained(folder)
        text = dict(llm("llama", byte_tokenizer()), vocab_size=296, eos_token_id=2, pad_token_id=11, bos_token_id=1)
        return (transformers.VoxtralProcessor(mels(), tokenizer),
                transformers.VoxtralConfig(
                    audio_config=dict(model_type="voxtral_encoder", hidden_size=32, intermediate_size=128,
                                      num_hidden_layers=2, num_attention_heads=2, num_mel_bins=16),
                    text_config=text, audio_token_id=24))
    if kind == "Qwen2Audio":
        tokenizer = byte_tokenizer("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<|en|>")
        return (transformers.Qwen2AudioProcessor(mels(), tokenizer),
                transformers.Qwen2AudioConfig(
                    audio_config=dict(model_type="qwen2_audio_encoder", **whisper_tower()),
                    text_config=llm("qwen2", tokenizer),
                    audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>")))
    raise ValueError(kind)


def randomise(model, seed=0):
    """Weights large enough for the audio to count, in place: every matrix keeps the size of what passes through it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                scale = 0.5 if "embed" in name else 1.5 * weight[0].numel() ** -0.5
                weight.normal_(0, scale, generator=generator)
    return model


@pytest.fixture(scope="session", params=POLICIES)
def checkpoint(request, tmp_path_factory):
    """(class, folder): the embedded recogniser for its class, a tiny random model for each of the others."""
    kind = request.param
    if kind == "FunAsrNano":
        return kind, "checkpoints/asr"
    folder = tmp_path_factory.mktemp(kind)
    processor, config = parts(kind, folder)
    with torch.random.fork_rng():
        model = randomise(getattr(transformers, f"{kind}ForConditionalGeneration")(config))
    eos = [config.text_config.eos_token_id, config.text_config.pad_token_id]
    model.generation_config = transformers.GenerationConfig(eos_token_id=eos, pad_token_id=eos[1])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if kind == "GraniteSpeech":                               # as published: with an adapter of its own beside it
        model.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=r".*language_model.*\.(q|v)_proj"))
        model.peft_config["default"].base_model_name_or_path = str(folder)
        transformers.PreTrainedModel.save_pretrained(model, folder)   # the class's own would spoil the base weights
    return kind, folder


@pytest.fixture(scope="session")
def policy(checkpoint, request):
    """(args, processor, policy) as grpo_asr.load gives it, its adapters moved off zero."""
    if checkpoint[0] == "FunAsrNano":
        return request.getfixturevalue("recogniser")
    made = load_policy("--model", str(checkpoint[1]))
    move_adapters(made[2], 0.1)
    return made


# ---- what the policy hears, samples and learns --------------------------------------------------------------------

def test_the_startup_check_passes_and_other_audio_changes_the_log_probs(policy, clips, capsys):
    """Pitfalls 1 and 5, for the untrained policy in the script's own words."""
    args = copy.copy(policy[0])
    args.max_tokens = 12
    with untrained(policy[2]):
        grpo_asr.check(policy[2], policy[1], clips[:2], args)
    line = r"ratio - 1\| (\S+), \|log pi - log pi_ref\| (\S+), other audio .* by (\S+) nats"
    ratio, drift, effect = map(float, re.search(line, capsys.readouterr().out).groups())
    assert ratio < 1e-4 and drift == 0 and effect > 0.03


def test_pitfall_1_audio_without_its_places_in_the_prompt_is_an_error(policy, clips):
    inputs = collate(policy[1], clips[:2], "en")
    inputs["input_ids"][inputs["input_ids"] == policy[2].config.audio_token_id] = 5
    with pytest.raises(RuntimeError, match="audio embeddings"):
        encode(policy[2], inputs)


def test_embeddings_and_greedy_text_are_those_of_the_class_itself(policy, clips):
    """encode + prefill against its own forward, sample against its own generate, clip by clip: none has padding."""
    _, processor, model = policy
    for clip in clips[:2]:
        inputs = collate(processor, [clip], "en")
        own = {name: value for name, value in inputs.items() if name != "frames"}
        with torch.no_grad():
            expected = model(**own).logits[:, -1]
            logits, _ = prefill(model, encode(model, inputs), 1)
        assert torch.allclose(logits, expected, atol=1e-4)
        out = model.generate(**own, do_sample=False, max_new_tokens=10)[:, inputs["input_ids"].shape[1]:]
        _, rollout = rollout_of(policy, [clip], group=1, temperature=0, limit=10)
        assert out[0][:int(rollout.mask.sum())].tolist() == rollout.ids[rollout.mask].tolist()


def test_pitfall_2_3_and_15_log_probs_are_those_of_the_sampler_and_of_each_clip_alone(policy, clips, monkeypatch):
    """In a batch of clips of mixed lengths, at a temperature that is not 1; all logits at once or, with the attention
    mask of a GPU, a row at a time."""
    mixed = sorted(clips, key=lambda u: u.seconds)[:: len(clips) // 3]
    prompts, rollout = rollout_of(policy, mixed, group=2, temperature=0.6, limit=12)
    assert len(set(prompts.mask.sum(dim=1).tolist())) > 1 or policy[1].__class__.__name__ == "VoxtralProcessor"
    assert (prompts.mask[:, -1] == 1).all()
    assert close(logprobs(policy, prompts, rollout, 2, 0.6), rollout.logp, rollout.mask, 1e-3)
    assert not close(logprobs(policy, prompts, rollout, 2), rollout.logp, rollout.mask, 0.05)
    monkeypatch.setattr("engine.sampling.AT_ONCE", 1)
    monkeypatch.setattr("engine.sampling.visible", causal)                          # as on a GPU
    assert close(logprobs(policy, prompts, rollout, 2, 0.6), rollout.logp, rollout.mask, 1e-3)
    for i, clip in enumerate(mixed):
        rows = slice(2 * i, 2 * i + 2)
        alone = encode(policy[2], collate(policy[1], [clip], "en"))
        with torch.no_grad():
            out = completion_logprobs(policy[2], alone, rollout.ids[rows], rollout.mask[rows], 2, 0.6)
        assert close(out, rollout.logp[rows], rollout.mask[rows], 1e-3)


def test_only_the_adapters_of_the_llm_learn_in_fp32_without_dropout(policy, clips):
    _, _, model = policy
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    assert len(trained) == 2 * layers * 7 and all("language_model" in n and "lora" in n for n in trained)
    assert all(weight.dtype == torch.float32 for weight in model.parameters() if weight.requires_grad)
    assert not any(module.training for module in model.modules()) and not model.is_gradient_checkpointing  # pitfall 14
    prompts, rollout = rollout_of(policy, clips[:1], group=4, limit=10)
    model.zero_grad()
    logp = completion_logprobs(model, prompts, rollout.ids, rollout.mask, 4, 1.0)
    grpo_loss(logp, rollout.logp, logp.detach(), torch.tensor([1.0, -1.0, 2.0, -2.0]), rollout.mask).backward()
    assert all((weight.grad is not None and float(weight.grad.norm()) > 0) == weight.requires_grad
               for weight in model.parameters())


def test_a_test_set_is_transcribed_in_its_own_order_and_transcripts_can_be_taught(policy, clips):
    """Through the processor's rate, tokenizer and end token, whatever the class."""
    args, processor, model = policy
    args = copy.copy(args)
    args.max_tokens = 10
    texts, metrics = grpo_asr.evaluate(model, processor, clips[:3], args)
    alone = [rollout_of(policy, [clip], group=1, temperature=0, limit=10)[1] for clip in clips[:3]]
    assert texts == [decode(processor, rollout)[0] for rollout in alone] and metrics["utterances"] == 3
    prompts = encode(model, collate(processor, clips[:3], "en"))
    taught = transcripts_as_rollout(model, processor, prompts, clips[:3], 1.0)
    assert decode(processor, taught) == [u.text for u in clips[:3]]
    last = taught.ids.gather(1, taught.mask.sum(1, keepdim=True) - 1)
    assert (last == processor.tokenizer.eos_token_id).all() and last[0] in torch.tensor(end_tokens(model))


def test_pitfall_23_every_linear_of_the_llm_is_quantised_and_nothing_else(checkpoint, request):
    """A list of modules to leave alone that matches none of them would go unnoticed."""
    model = (request.getfixturevalue("eight_bit") if checkpoint[0] == "FunAsrNano" else
             load_policy("--model", str(checkpoint[1]), "--quantize", "8bit"))[2]
    names = [name for name, module in model.named_modules() if isinstance(module, Linear8bitLt)]
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    assert len(names) == 7 * layers and all("language_model" in name for name in names)


def test_pitfall_19_merged_and_saved_it_has_the_same_logits_in_plain_transformers(policy, checkpoint, clips, tmp_path):
    _, processor, model = policy
    inputs = collate(processor, clips[:2], "en")
    with torch.no_grad():
        expected = prefill(model, encode(model, inputs), 1)[0]
        with model.disable_adapter():
            assert not torch.allclose(prefill(model, encode(model, inputs), 1)[0], expected, atol=0.05)
        copy.deepcopy(model).merge_and_unload().save_pretrained(tmp_path)
        assert not (tmp_path / "adapter_config.json").exists()
        plain = mend_attention(transformers.AutoModelForMultimodalLM.from_pretrained(tmp_path).eval())
        logits = prefill(plain, Prompts(embed(plain, inputs), inputs["attention_mask"]), 1)[0]
        if checkpoint[0] == "GraniteSpeech":
            logits = logits / 2                                                    # what settle puts right
        assert torch.allclose(logits, expected, atol=1e-4)


# ---- answers and prompts -----------------------------------------------------------------------------------------

ANSWERS = {
    "FunAsrNano": [("anna met peter", "anna met peter")], "GlmAsr": [("anna met peter\n", "anna met peter")],
    "GraniteSpeech": [("anna met peter", "anna met peter")], "Voxtral": [(" anna met peter", "anna met peter")],
    "Qwen2Audio": [("<|en|>anna met peter", "anna met peter")],
    "Qwen3ASR": [("anna met peter", "anna met peter"), ("language English<asr_text>anna met peter", "anna met peter"),
                 ("language None<asr_text>", ""), ("anna<asr_text>met peter", "anna<asr_text>met peter")]}


def test_the_answer_of_each_class_becomes_a_transcript(policy, checkpoint):
    """Nothing but the documented form is cut off: a sample can't hide words before a mark."""
    _, processor, model = policy
    for answer, transcript in ANSWERS[checkpoint[0]]:
        for eos in end_tokens(model):
            ids = torch.tensor([processor.tokenizer(answer, add_special_tokens=False).input_ids + [eos, 5, 6]])
            mask = completion_mask(ids, end_tokens(model))
            assert decode(processor, Rollout(ids, mask, None, None, None)) == [transcript]


def test_language_and_keywords_are_in_the_prompt_where_the_class_has_a_place(policy, checkpoint, clips):
    _, processor, _ = policy
    clip = replace(clips[0], listed=("zanzibar", "quux"))
    if not RECOGNISERS[checkpoint[0]].keywords:
        with pytest.raises(DataError, match="--hotwords: the prompt of a .* has no place"):
            collate(processor, [clip], "en")
    else:
        ids = collate(processor, [clip], "en")["input_ids"][0]
        assert "zanzibar" in processor.tokenizer.decode(ids) and "quux" in processor.tokenizer.decode(ids)
    prompt = processor.tokenizer.decode(collate(processor, clips[:1], "en")["input_ids"][0])
    mark = {"FunAsrNano": "英文", "Qwen3ASR": "language English<asr_text>", "Voxtral": "lang:en",
            "Qwen2Audio": "<|en|>", "GlmAsr": "transcribe", "GraniteSpeech": "written format?"}[checkpoint[0]]
    assert mark in prompt and "zanzibar" not in prompt


# ---- Granite's own adapter and logits ------------------------------------------------------------------------------

@pytest.mark.parametrize("checkpoint", ["GraniteSpeech"], indirect=True)
def test_the_adapter_that_a_checkpoint_brings_belongs_to_the_reference(policy, checkpoint, clips):
    _, processor, model = policy
    own = transformers.AutoModelForMultimodalLM.from_pretrained(checkpoint[1]).eval()
    assert own.active_adapters() == ["default"]
    inputs = collate(processor, clips[:1], "en")
    prompts = encode(model, inputs)
    given = {name: value for name, value in inputs.items() if name != "frames"}
    with torch.no_grad(), model.disable_adapter():
        now = prefill(model, prompts, 1)[0]
        assert torch.allclose(now, own(**given).logits[:, -1] / 2, atol=1e-4)
        own.disable_adapters()
        assert not torch.allclose(now, own(**given).logits[:, -1] / 2, atol=0.05)


@pytest.mark.parametrize("checkpoint", ["GraniteSpeech"], indirect=True)
def test_the_logits_of_granite_are_those_of_its_llm(checkpoint):
    """GraniteForCausalLM with the same weights is what the checkpoints were trained as."""
    _, model = load_recogniser(str(checkpoint[1]))
    alone = transformers.GraniteForCausalLM(model.config.text_config).eval()
    alone.model.load_state_dict(model.model.language_model.state_dict())
    alone.lm_head.weight = model.lm_head.weight
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, alone(input_ids=ids).logits, atol=1e-4)


# ---- judges and strangers ------------------------------------------------------------------------------------------

def test_each_can_be_a_judge(policy, checkpoint, clips):
    """Waveforms of mixed lengths, the second read as it is alone, the first as the policy without adapters reads it."""
    judge = Judge(str(checkpoint[1]), CPU)
    waves = [clip.waveform(judge.rate) for clip in clips[:2]]
    together = judge.transcribe(waves)
    assert any(together) and together[1:] == judge.transcribe(waves[1:])
    with policy[2].disable_adapter():
        _, rollout = rollout_of(policy, clips[:1], group=1, temperature=0, limit=16 + int(8 * clips[0].seconds))
    assert decode(policy[1], rollout) == together[:1]


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisper")
    vocab = {letter: i for i, letter in enumerate([*sorted(ByteLevel.alphabet()), PAD, "<|startoftranscript|>"])}
    tokenizer = transformers.WhisperTokenizer(vocab=vocab, merges=[], bos_token=PAD, eos_token=PAD, unk_token=PAD)
    tokenizer.add_special_tokens({"additional_special_tokens": [
        "<|startoftranscript|>", "<|en|>", "<|translate|>", "<|transcribe|>", "<|notimestamps|>"]})
    token = tokenizer.convert_tokens_to_ids
    config = transformers.WhisperConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=16, pad_token_id=256,
        bos_token_id=256, eos_token_id=256, decoder_start_token_id=257, max_target_positions=448)
    model = randomise(transformers.WhisperForConditionalGeneration(config))
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=256, pad_token_id=256, decoder_start_token_id=257, is_multilingual=True, return_timestamps=False,
        lang_to_id={"<|en|>": token("<|en|>")}, no_timestamps_token_id=token("<|notimestamps|>"), max_length=448,
        task_to_id={"transcribe": token("<|transcribe|>"), "translate": token("<|translate|>")})
    model.save_pretrained(folder)
    transformers.WhisperProcessor(mels(), tokenizer).save_pretrained(folder)
    return folder


def test_whisper_can_be_a_judge_but_no_policy(whisper, clips):
    judge = Judge(str(whisper), CPU)
    waves = [clip.waveform(judge.rate) for clip in clips[:2]]
    together = judge.transcribe(waves)
    assert any(together) and together == [judge.transcribe([wave])[0] for wave in waves]
    with pytest.raises(DataError, match="WhisperProcessor; known are FunAsrNano, .*Qwen2Audio$"):
        load_recogniser(str(whisper))


def test_a_stranger_gets_one_line(tmp_path):
    tokenizer = byte_tokenizer()
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**llm("llama", tokenizer))).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="error: --model .*: comes with a .*; known are FunAsrNano, Qwen3ASR"):
        grpo_asr.main(["--model", str(tmp_path), "--device", "cpu"])
