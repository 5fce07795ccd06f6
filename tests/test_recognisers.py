"""Every class of recognisers.py, as a tiny random model in an ordinary folder, through the script's own lines.

The processors are the real classes; the chat templates and the tokenizers are small ones of our own.
"""
import base64
import copy
import json
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import ROOT, move_adapters
from peft import LoraConfig
from test_policy import close, logprobs, rollout_of
from tokenizers.pre_tokenizers import ByteLevel

import data
import grpo_asr
from data import DataError, collate, load_recogniser
from grpo_asr import completion_logprobs, decode, encode, end_tokens, grpo_loss
from judges import Judge
from recognisers import RECOGNISERS, embed
from sampling import Prompts, Rollout, micro_batches, prefill

POLICIES = [kind for kind, row in RECOGNISERS.items() if row.hear]
CPU = torch.device("cpu")
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
    if kind == "FunAsrNano":
        tokenizer = byte_tokenizer("<|object_ref_start|>")
        chat = CHAT.replace("AUDIO", "<|object_ref_start|>")
        return (transformers.FunAsrNanoProcessor(transformers.FunAsrNanoFeatureExtractor(), tokenizer, chat),
                transformers.FunAsrNanoConfig(
                    audio_config=dict(model_type="fun_asr_nano_encoder", hidden_size=32, num_attention_heads=2,
                                      intermediate_size=64, num_hidden_layers=2, num_timestamp_prediction_layers=0),
                    adaptor_config=dict(hidden_size=32, num_attention_heads=2, intermediate_size=8,
                                        num_hidden_layers=1, projector_hidden_size=64),
                    text_config=llm("qwen3", tokenizer), audio_token_id=tokenizer.convert_tokens_to_ids(
                        "<|object_ref_start|>")))
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
    """(class, folder) of a tiny random model."""
    kind = request.param
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
def sets(tmp_path_factory):
    """Folders of six clips to train on and three to test on, the shortest of d0."""
    root = tmp_path_factory.mktemp("sets")
    short = sorted((u for u in data.load_folder("data/d0") if u.text), key=lambda u: u.seconds)[:9]
    for name, part in (("train", short[:6]), ("short", short[6:])):
        (root / name).mkdir()
        rows = [json.dumps({"file_name": str((ROOT / u.path).resolve()), "text": u.text}) for u in part]
        (root / name / "metadata.jsonl").write_text("\n".join(rows))
    return root


@pytest.fixture(scope="session")
def policy(checkpoint):
    """(args, processor, policy) as grpo_asr.load gives it, its adapters moved off zero."""
    args = grpo_asr.parse_args(["--device", "cpu", "--model", str(checkpoint[1])])
    data.quiet()
    processor, model = grpo_asr.load(args, CPU)
    move_adapters(model, 0.1)
    return args, processor, model


# ---- what the policy hears, samples and learns --------------------------------------------------------------------

def test_pitfall_1_other_audio_changes_the_log_probs(policy, clips):
    prompts, rollout = rollout_of(policy, clips[:2])
    _, processor, model = policy
    other = encode(model, collate(processor, clips[2:4], "en"))
    change = (logprobs(policy, prompts, rollout) - logprobs(policy, other, rollout))[rollout.mask].abs().mean()
    assert change > 0.05


def test_pitfall_1_audio_without_its_places_in_the_prompt_is_an_error(policy, clips):
    inputs = collate(policy[1], clips[:2], "en")
    inputs["input_ids"][inputs["input_ids"] == policy[2].config.audio_token_id] = 5
    with pytest.raises(RuntimeError, match="audio embeddings"):
        encode(policy[2], inputs)


def test_embeddings_are_those_of_the_models_own_forward(policy, clips):
    """encode + prefill against one call of the class itself, clip by clip: none has padding then."""
    for clip in clips[:3]:
        inputs = collate(policy[1], [clip], "en")
        own = {name: value for name, value in inputs.items() if name != "frames"}
        with torch.no_grad():
            expected = policy[2](**own).logits[:, -1]
            first, _ = prefill(policy[2], encode(policy[2], inputs), 1)
        assert torch.allclose(first, expected, atol=1e-4)


def test_pitfall_15_a_batch_of_mixed_lengths_equals_its_clips_alone(policy, clips):
    mixed = sorted(clips, key=lambda u: u.seconds)[:: len(clips) // 3]
    prompts, together = rollout_of(policy, mixed, group=2, limit=12)
    assert len(set(prompts.mask.sum(dim=1).tolist())) > 1 or policy[1].__class__.__name__ == "VoxtralProcessor"
    assert (prompts.mask[:, -1] == 1).all()
    for i, clip in enumerate(mixed):
        rows = slice(2 * i, 2 * i + 2)
        alone = encode(policy[2], collate(policy[1], [clip], "en"))
        with torch.no_grad():
            out = completion_logprobs(policy[2], alone, together.ids[rows], together.mask[rows], 2, 1.0)
        assert close(out, together.logp[rows], together.mask[rows], 1e-3)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_pitfall_3_and_5_sampled_log_probs_are_the_trained_ones(policy, clips, temperature):
    prompts, rollout = rollout_of(policy, clips[:2], temperature=temperature, limit=12)
    assert close(logprobs(policy, prompts, rollout, temperature=temperature), rollout.logp, rollout.mask, 1e-3)
    assert not any(module.training for module in policy[2].modules())


def test_greedy_equals_generate(policy, clips):
    """The class's own generate on its own inputs, one clip at a time."""
    _, processor, model = policy
    for clip in clips[:2]:
        inputs = collate(processor, [clip], "en")
        own = {name: value for name, value in inputs.items() if name != "frames"}
        out = model.generate(**own, do_sample=False, max_new_tokens=10)[:, inputs["input_ids"].shape[1]:]
        _, rollout = rollout_of(policy, [clip], group=1, temperature=0, limit=10)
        assert out[0][:int(rollout.mask.sum())].tolist() == rollout.ids[rollout.mask].tolist()


def test_only_the_adapters_of_the_llm_learn(policy, clips):
    _, processor, model = policy
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert len(trained) == 2 * 2 * 7 and all("language_model" in n and "lora" in n for n in trained)
    prompts, rollout = rollout_of(policy, clips[:2], group=4, limit=10)
    model.zero_grad()
    for part, rows, group in micro_batches(2, 4, 4):
        logp = completion_logprobs(model, prompts[part], rollout.ids[rows], rollout.mask[rows], group, 1.0)
        grpo_loss(logp, rollout.logp[rows], logp.detach(), torch.tensor([1.0, -1.0, 2.0, -2.0]),
                  rollout.mask[rows]).backward()
    assert all((weight.grad is not None and float(weight.grad.norm()) > 0) == weight.requires_grad
               for weight in model.parameters())


def test_two_steps_of_the_script(checkpoint, sets, tmp_path, capsys):
    """Its own start-up check (ratio 1, KL 0, other audio), two steps of GRPO, evaluation, files."""
    flags = ["--device", "cpu", "--model", str(checkpoint[1]), "--data", str(sets / "train"), "--test",
             str(sets / "short"), "--batch", "2", "--group", "2", "--max-tokens", "8", "--steps", "2"]
    grpo_asr.main([*flags, "--out", str(tmp_path / "grpo"), "--rewards", "R1,R2"])
    said = capsys.readouterr().out
    assert "check: |ratio - 1|" in said and "KL 0.0e+00" in said and "in 2 steps" in said
    rows = [json.loads(line) for line in (tmp_path / "grpo" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "reward" in row] == [0, 1]
    grpo_asr.main([*flags, "--out", str(tmp_path / "taught"), "--supervised"])
    rows = [json.loads(line) for line in (tmp_path / "taught" / "log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "reward" in row]
    assert [row["wer"] for row in rows] == [0, 0]               # the references, through tokenizer and decode
    assert all(row["grad_norm"] > 0 for row in rows) and rows[0]["kl"] == 0 < rows[1]["kl"]


def test_only_the_llm_is_quantised(checkpoint):
    args = grpo_asr.parse_args(["--device", "cpu", "--model", str(checkpoint[1]), "--quantize", "8bit"])
    _, model = grpo_asr.load(args, CPU)
    names = [name for name, module in model.named_modules()
             if type(module).__name__ == "Linear8bitLt" and name.endswith("base_layer")]
    assert len(names) == 2 * 7 and all("language_model" in name for name in names)
    assert len(names) == sum(type(module).__name__ == "Linear8bitLt" for module in model.modules()
                             if not hasattr(module, "base_layer"))


def test_pitfall_19_merged_and_saved_it_has_the_same_logits_in_plain_transformers(policy, checkpoint, clips, tmp_path):
    _, processor, model = policy
    inputs = collate(processor, clips[:2], "en")
    with torch.no_grad():
        expected = prefill(model, encode(model, inputs), 1)[0]
        with model.disable_adapter():
            assert not torch.allclose(prefill(model, encode(model, inputs), 1)[0], expected, atol=0.05)
        copy.deepcopy(model).merge_and_unload().save_pretrained(tmp_path)
        assert not (tmp_path / "adapter_config.json").exists()
        plain = transformers.AutoModelForMultimodalLM.from_pretrained(tmp_path).eval()
        logits = prefill(plain, encode_plain(plain, inputs), 1)[0]
        if checkpoint[0] == "GraniteSpeech":
            assert torch.allclose(logits / 2, expected, atol=1e-4)                # what settle puts right
        else:
            assert torch.allclose(logits, expected, atol=1e-4)


def encode_plain(model, inputs):
    return Prompts(embed(data.mend_attention(model), inputs), inputs["attention_mask"])


# ---- answers and prompts -----------------------------------------------------------------------------------------

ANSWERS = {
    "FunAsrNano": [(" anna met peter ", "anna met peter")], "GlmAsr": [("anna met peter\n", "anna met peter")],
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
            mask = grpo_asr.completion_mask(ids, end_tokens(model))
            assert decode(processor, Rollout(ids, mask, None, None, None)) == [transcript]


def test_language_and_keywords_are_in_the_prompt_where_the_class_has_a_place(policy, checkpoint, clips):
    _, processor, _ = policy
    clip = replace(clips[0], keywords=("zanzibar", "quux"))
    if not RECOGNISERS[checkpoint[0]].keywords:
        with pytest.raises(DataError, match="--hotwords: the prompt of a .* has no place"):
            collate(processor, [clip], "en", hotwords=True)
    else:
        ids = collate(processor, [clip], "en", hotwords=True)["input_ids"][0]
        assert "zanzibar" in processor.tokenizer.decode(ids) and "quux" in processor.tokenizer.decode(ids)
    prompt = processor.tokenizer.decode(collate(processor, [clip], "en")["input_ids"][0])
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
    """Waveforms of mixed lengths, each read as it is alone, and as the policy without adapters reads it."""
    judge = Judge(str(checkpoint[1]), CPU)
    waves = [clip.waveform(judge.rate) for clip in clips[:3]]
    together = judge.transcribe(waves)
    assert any(together) and together == [judge.transcribe([wave])[0] for wave in waves]
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
