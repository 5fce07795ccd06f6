"""Builds the embedded models of chapters 2 and 3: a codec, an LLM that speaks, a speaker model, a Token2Text model.

The stages, called by `python -m pretrain STAGE`, in this order:
    voices       speak the sentences of the TTS corpus, at one loudness            build/voices.pt
    codec        waveform <-> speech tokens, 25 a second                           checkpoints/codec
    tokens       every sentence as speech tokens                                   build/tokens/metadata.jsonl
    tts          the LLM of chapter 2: text and a voice in, speech tokens out      checkpoints/tts
    token2text   the reward model of DiffRO: log P(text | soft speech tokens)      checkpoints/token2text
    speaker      whose voice is it: x-vectors                                      checkpoints/speaker
    texts        sentences for RL, test recordings, a reference of every voice     data/tts
Everything here is our choice; the classes are those of the published checkpoints.
"""
import copy
import json
import math
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jiwer
import numpy as np
import torch
import torchaudio
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MBartConfig,
    MBartForConditionalGeneration,
    PreTrainedTokenizerFast,
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
    WavLMForXVector,
    Xcodec2Config,
    Xcodec2FeatureExtractor,
    Xcodec2Model,
)

from engine.judges import Judge
from engine.run import pick_device
from pretrain import corpus

BUILD, CHECKPOINTS, DATA = Path("build"), Path("checkpoints"), Path("data")
RATE = corpus.SAMPLE_RATE
# The voices of the TTS LLM, all of them known to both recognisers: three accents; four formant, one recorded.
TTS_VOICES = [("espeak-ng", "en-us+m1"), ("espeak-ng", "en-gb+f1"), ("espeak-ng", "en-gb-x-rp+f2"),
              ("espeak-ng", "en-gb-x-gbclan+Lee"), ("flite", "kal16")]
OTHER_SHARE = 0.15  # of the corpus: all other source voices, for the codec and the speaker model alone
LEVEL = 0.6         # peak of every recording of this corpus
# The prompt of Llasa, as the chat template of its tokenizer renders it.
CHAT_TEMPLATE = r"""{{ '<|begin_of_text|>' }}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content }}
{%- if not (loop.last and continue_final_message) -%}{{ '<|eot_id|>' }}{%- endif -%}
{%- endfor -%}"""
SPECIAL = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|finetune_right_pad_id|>",
           "<|TEXT_UNDERSTANDING_START|>", "<|TEXT_UNDERSTANDING_END|>", "<|SPEECH_GENERATION_START|>",
           "<|SPEECH_GENERATION_END|>"]


# ---- voices ------------------------------------------------------------------------------------------------

def plan_voices(count, seed):
    """What will be said: `count` rows (text, voice, seed), no sentence twice, none that is kept for tests."""
    rng = np.random.default_rng([seed, 11])
    rows = []
    for i, (text, _) in enumerate(corpus.unique_sentences(rng, count, set(), held_out=False)):
        voices = corpus.SOURCE_VOICES if rng.random() < OTHER_SHARE else TTS_VOICES
        rows.append((text, voices[int(rng.integers(len(voices)))], seed + i))
    return rows


def say(row):
    """One planned row as int16 samples at 16 kHz."""
    torch.set_num_threads(1)  # a process a core: more threads would wait for each other
    text, voice, seed = row
    wave = corpus.speak(text, voice, np.random.default_rng([seed, 13]))
    return np.round(wave * (LEVEL / np.abs(wave).max()) * 32767).astype(np.int16)


def speak_voices(args):
    """Speaks the TTS corpus on all cores; build/voices.pt holds the samples one after another, and their texts."""
    rows, started = plan_voices(args.tts_count, args.seed), time.time()
    with ProcessPoolExecutor(args.workers) as pool:
        waves = list(tqdm(pool.map(say, rows, chunksize=32), total=len(rows), desc="voices", mininterval=5))
    BUILD.mkdir(exist_ok=True)
    torch.save({"samples": torch.from_numpy(np.concatenate(waves)), "lengths": torch.tensor([len(w) for w in waves]),
                "text": [r[0] for r in rows], "voice": [r[1][1] for r in rows]}, BUILD / "voices.pt")
    print(f"voices: {len(rows)} utterances, {sum(map(len, waves)) / RATE / 3600:.1f} h, {time.time() - started:.0f} s")


# ---- codec -------------------------------------------------------------------------------------------------

def build_codec(rate, levels, seed=1):
    """A small `Xcodec2Model` with `rate` tokens a second, and its feature extractor.

    The semantic branch (mel features through two conformer layers) is trained along here: it hands the quantiser
    inputs of unit variance from the start, without which only 1 to 10 codes were ever used.
    """
    torch.manual_seed(seed)
    ratios = {50: [2, 2, 4, 4, 5], 25: [2, 4, 4, 4, 5]}[rate]
    semantic = dict(model_type="wav2vec2-bert", hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
                    intermediate_size=512, feature_projection_input_dim=160, conv_depthwise_kernel_size=15,
                    layerdrop=0.0, mask_time_prob=0.0, mask_feature_prob=0.0, hidden_dropout=0.0, attention_dropout=0.0,
                    activation_dropout=0.0, feat_proj_dropout=0.0, conformer_conv_dropout=0.0, apply_spec_augment=False)
    if rate == 25:  # an even kernel: 2k + 1 mel frames become k, as many as the acoustic branch has
        semantic |= dict(add_adapter=True, num_adapter_layers=1, adapter_kernel_size=4, adapter_stride=2)
    config = Xcodec2Config(
        encoder_hidden_size=2, downsampling_ratios=ratios, semantic_model_config=semantic, quantization_levels=levels,
        quantization_dim=128 + 256, hidden_size=256, intermediate_size=768, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, head_dim=64, activation_dropout=0.0, initializer_range=0.04)
    return Xcodec2Model(config), Xcodec2FeatureExtractor(hop_length=config.hop_length)


def codec_features(waves, hop):
    """The extractor's mel features for a batch without padding: (N, samples) -> (N, frames, 160), on any device.

    `samples` is a multiple of `hop`. Frames that straddle two waveforms are computed and dropped.
    """
    padded = torch.nn.functional.pad(waves, (hop // 2, hop // 2))
    each = padded.shape[1] // 160                          # frames from one start to the next
    flat = torch.nn.functional.pad(padded.reshape(1, -1), (0, 400)) * 2 ** 15
    with torch.autocast(waves.device.type, enabled=False):
        mel = torchaudio.compliance.kaldi.fbank(flat, num_mel_bins=80, dither=0.0, window_type="povey",
                                                sample_frequency=RATE, high_freq=RATE // 2)
    mel = mel[:each * len(waves)].view(len(waves), each, 80)[:, :(padded.shape[1] - 400) // 160 + 1]
    mel = (mel - mel.mean(1, keepdim=True)) / torch.sqrt(mel.var(1, keepdim=True, unbiased=True) + 1e-7)
    return mel[:, :mel.shape[1] // 2 * 2].reshape(len(waves), -1, 160)


def quantise(codec, waves):
    """What `Xcodec2Model.encode` does, with gradients: (N, samples) -> latents (N, T, D), codes (N, T)."""
    features = codec_features(waves, codec.hop_length)
    semantic = codec.semantic_adapter(codec.semantic_encoder(features).last_hidden_state.transpose(1, 2))
    both = torch.cat([semantic, codec.acoustic_encoder(waves[:, None])], dim=1).transpose(1, 2)
    latents, codes = codec.quantizer(codec.fc_encoder(both))
    return latents, codes[..., 0]


def spread_codes(codec, waves):
    """Sets the quantiser's input projection so that its outputs have mean 0 and variance 1 on `waves`."""
    layer, seen = codec.quantizer.project_in, []
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(output.float().flatten(0, 1)))
    with torch.no_grad():
        quantise(codec, waves)
        hook.remove()
        layer.weight /= seen[0].std(0)[:, None]
        layer.bias.copy_((layer.bias - seen[0].mean(0)) / seen[0].std(0))


def mel_loss(audio, target, transforms):
    """Mean distance of log-mel spectrograms over several window lengths; (N, samples) both."""
    return sum((torch.log(t(audio).clamp(min=1e-4)) - torch.log(t(target).clamp(min=1e-4))).abs().mean()
               for t in transforms) / len(transforms)


def train_codec(args, name="codec", rate=25, levels=(4, 4, 4, 4, 4, 4), seconds=1.92, batch=48):
    """Trains the codec on random cuts of build/voices.pt; the loss is the mel spectrogram alone."""
    data = torch.load(BUILD / "voices.pt", weights_only=True, mmap=True)
    device = pick_device(args.device)
    codec, extractor = build_codec(rate, list(levels))
    codec.to(device).train()
    samples, lengths = data["samples"].to(device), data["lengths"]
    size = int(seconds * RATE)
    offsets = torch.cumsum(lengths, 0) - lengths
    usable = ((lengths >= size) & (torch.arange(len(lengths)) < len(lengths) - 200)).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(args.seed)
    transforms = [torchaudio.transforms.MelSpectrogram(RATE, n, hop_length=n // 4, n_mels=m, power=1).to(device)
                  for n, m in ((2048, 128), (1024, 80), (512, 40), (256, 20))]

    def cut(count):
        rows = usable[torch.randint(len(usable), (count,), generator=generator)]
        start = offsets[rows] + (torch.rand(count, generator=generator) * (lengths[rows] - size)).long()
        return samples[start.to(device)[:, None] + torch.arange(size, device=device)].float() / 32768

    spread_codes(codec, cut(batch))
    optimizer = torch.optim.AdamW(codec.parameters(), lr=8e-4, betas=(0.8, 0.99), weight_decay=0.01,
                                  fused=device.type == "cuda")
    steps, started = args.codec_steps, time.time()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 200) * (
        0.5 * (1 + math.cos(math.pi * min(1, s / steps))) + 1e-3))
    used = set()
    for step in range(steps):
        waves = cut(batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            latents, codes = quantise(codec, waves)
            audio = codec.acoustic_decoder(latents)[:, 0]
        loss = mel_loss(audio.float(), waves, transforms)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 20) >= max(1, steps // 20) - 10:
            used |= set(codes.flatten().tolist())
        if step % max(1, steps // 20) == max(1, steps // 20) - 1:
            print(f"{name} step {step + 1} loss {float(loss.detach()):.4f} codes {len(used)} "
                  f"{time.time() - started:.0f} s", flush=True)
            used = set()
    codec.eval().to(torch.bfloat16).cpu().save_pretrained(CHECKPOINTS / name)
    extractor.save_pretrained(CHECKPOINTS / name)
    print(f"{name}: {sum(p.numel() for p in codec.parameters()) / 1e6:.2f}M parameters, {time.time() - started:.0f} s")


def load_codec(device, name="codec"):
    """The saved codec, in fp32 on `device`."""
    return Xcodec2Model.from_pretrained(CHECKPOINTS / name, dtype=torch.float32).eval().to(device)


@torch.inference_mode()
def encode_waves(codec, samples, lengths, most=2 ** 22):
    """int16 samples one after another -> a list of code arrays; clips of equal length in tokens go together.

    The extractor appends one sample and fills up to a whole token with silence; so does this, without its padding.
    """
    device, hop = codec.device, codec.hop_length
    offsets, tokens = torch.cumsum(lengths, 0) - lengths, (lengths // hop + 1).numpy()
    found = [None] * len(lengths)
    for count in np.unique(tokens):
        rows = np.flatnonzero(tokens == count)
        for part in np.array_split(rows, max(1, len(rows) * count * hop // most)):
            waves = torch.zeros(len(part), count * hop)
            for j, i in enumerate(part):
                waves[j, :lengths[i]] = samples[offsets[i]:offsets[i] + lengths[i]].float() / 32768
            codes = quantise(codec, waves.to(device))[1].cpu().numpy()
            for j, i in enumerate(part):
                found[i] = codes[j]
    return found


@torch.inference_mode()
def decode_tokens(codec, codes, most=16_000):
    """A list of code arrays -> a list of float32 waveforms; rows of equal length go together, so nothing is padded."""
    lengths, found = np.array([len(c) for c in codes]), [None] * len(codes)
    for count in np.unique(lengths):
        rows = np.flatnonzero(lengths == count)
        for part in np.array_split(rows, -(-len(rows) * count // most)):
            ids = torch.from_numpy(np.stack([codes[i] for i in part])).to(codec.device)
            for i, wave in zip(part, codec.decode(ids[:, None]).audio_values[:, 0].cpu().numpy()):
                found[i] = wave
    return found


def encode_corpus(args):
    """Writes every utterance of build/voices.pt as speech tokens to build/tokens/metadata.jsonl."""
    data, started = torch.load(BUILD / "voices.pt", weights_only=True, mmap=True), time.time()
    codes = encode_waves(load_codec(pick_device(args.device)), data["samples"], data["lengths"])
    (BUILD / "tokens").mkdir(parents=True, exist_ok=True)
    with open(BUILD / "tokens" / "metadata.jsonl", "w", encoding="utf-8") as out:
        for text, voice, row in zip(data["text"], data["voice"], codes):
            out.write(json.dumps({"text": text, "voice": voice, "tokens": row.tolist()}) + "\n")
    counts = np.bincount(np.concatenate(codes))
    print(f"tokens: {len(codes)} utterances, {sum(map(len, codes))} tokens, {(counts > 0).sum()} codes in use, "
          f"{time.time() - started:.0f} s")


def check_codec(args, name="codec", count=200):
    """Word error rate of the last, unseen utterances as they were spoken and after the codec, and codes in use."""
    data = torch.load(BUILD / "voices.pt", weights_only=True, mmap=True)
    codec = load_codec(pick_device(args.device), name)
    lengths, text = data["lengths"][-count:], data["text"][-count:]
    samples = data["samples"][-int(lengths.sum()):]
    codes = encode_waves(codec, samples, lengths)
    spoken = [w.float().numpy() / 32768 for w in samples.split(lengths.tolist())]
    for reader in (r for r in ("asr", "asr2") if (CHECKPOINTS / r).exists()):
        first, second = (jiwer.wer(text, Judge(f"{CHECKPOINTS}/{reader}", pick_device(args.device)).transcribe(waves))
                         for waves in (spoken, decode_tokens(codec, codes)))
        print(f"{name} read by {reader}: WER {100 * first:.2f} % as spoken, {100 * second:.2f} % decoded; "
              f"{len(np.unique(np.concatenate(codes)))} codes in {count} utterances", flush=True)


# ---- the LLM that speaks -----------------------------------------------------------------------------------

def read_tokens(folder, seed=1):
    """metadata.jsonl of a folder with "text" and "tokens" (and "voice"): rows in a fixed random order."""
    with open(Path(folder) / "metadata.jsonl", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]


def build_tokenizer(codes):
    """Text as bytes, `codes` speech tokens <|s_N|> and the special tokens of Llasa."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token=SPECIAL[3],
                                   pad_token=SPECIAL[4], padding_side="left", chat_template=CHAT_TEMPLATE,
                                   additional_special_tokens=SPECIAL[5:], model_max_length=1024)
    fast.add_tokens(SPECIAL[1:3] + [f"<|s_{i}|>" for i in range(codes)], special_tokens=True)
    return fast


def prompt(text, codes):
    """The conversation that asks Llasa to say `text`, going on after `codes`."""
    return [{"role": "user", "content": f"Convert the text to speech:<|TEXT_UNDERSTANDING_START|>{text}"
                                        "<|TEXT_UNDERSTANDING_END|>"},
            {"role": "assistant", "content": "<|SPEECH_GENERATION_START|>" + "".join(f"<|s_{c}|>" for c in codes)}]


def train_tts(args):
    """Supervised training of the speaking LLM on build/tokens: pairs of one voice, the first is the reference.

    Snapshots along the way go to build/tts-STEP; the last is checkpoints/tts.
    """
    device, started = pick_device(args.device), time.time()
    names = {v for _, v in TTS_VOICES}
    rows = [r for r in read_tokens(BUILD / "tokens") if r["voice"] in names][200:]   # 200 for checking
    codes = math.prod(Xcodec2Config.from_pretrained(CHECKPOINTS / "codec").quantization_levels)
    tokenizer = build_tokenizer(codes)
    first, end = (tokenizer.convert_tokens_to_ids(t) for t in ("<|s_0|>", "<|SPEECH_GENERATION_END|>"))
    frame = tokenizer.apply_chat_template(prompt("@", []), tokenize=False, continue_final_message=True)
    before, after = (tokenizer(half, add_special_tokens=False).input_ids for half in frame.split("@"))
    text = [tokenizer(r["text"], add_special_tokens=False).input_ids for r in rows]
    space = tokenizer(" ", add_special_tokens=False).input_ids
    speech = [(np.array(r["tokens"]) + first).tolist() for r in rows]
    members = {v: np.array([i for i, r in enumerate(rows) if r["voice"] == v]) for v in names}
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=True, attention_dropout=0.1,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=tokenizer.pad_token_id)).to(device).train()
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.1,
                                  fused=device.type == "cuda")
    # constant after a warm-up, so that a snapshot is what a shorter run would have given
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 480))
    rng = np.random.default_rng(5)

    def batch(count):
        sequences, targets = [], []
        for i in rng.integers(len(rows), size=count):
            said, spoken = text[i], speech[i]
            if rng.random() < 0.9:
                pool = members[rows[i]["voice"]]
                j = pool[rng.integers(len(pool))]
                said, spoken = text[j] + space + said, speech[j] + spoken
            sequences.append(before + said + after + spoken + [end])
            targets.append(len(spoken) + 1)
        length = max(map(len, sequences))
        ids, labels = np.full((count, length), tokenizer.pad_token_id), np.full((count, length), -100)
        for k, (row, n) in enumerate(zip(sequences, targets)):
            ids[k, :len(row)] = row
            labels[k, len(row) - n:len(row)] = row[-n:]
        return torch.from_numpy(ids).to(device), torch.from_numpy(labels).to(device)

    for step in range(1, args.tts_steps + 1):
        ids, labels = batch(args.batch)
        # some speech tokens read are not those said: what sampling will do to the context
        wrong = (torch.rand(ids.shape, device=device) < 0.05) & (labels >= first) & (ids >= first)
        noisy = torch.where(wrong, torch.randint_like(ids, first, first + codes), ids)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(input_ids=noisy, attention_mask=(ids != tokenizer.pad_token_id).long(), labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, args.tts_steps // 8) == 0 or step == args.tts_steps:
            print(f"tts step {step} loss {float(loss.detach()):.4f} {time.time() - started:.0f} s", flush=True)
            folder = CHECKPOINTS / "tts" if step == args.tts_steps else BUILD / f"tts-{step}"
            tokenizer.save_pretrained(folder)
            copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    print(f"tts: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {time.time() - started:.0f} s")


@torch.inference_mode()
def check_tts(args, count=128):
    """Word error rate of unseen sentences sampled at temperature 1, of every snapshot, by both recognisers."""
    device = pick_device(args.device)
    codec = load_codec(device)
    rows = [r for r in read_tokens(BUILD / "tokens") if r["voice"] in {v for _, v in TTS_VOICES}][:200]
    voices = {r["voice"]: r for r in rows}
    part = rows[:count]
    for folder in [*sorted(BUILD.glob("tts-*"), key=lambda f: int(f.name[4:])), CHECKPOINTS / "tts"]:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
        first = tokenizer.convert_tokens_to_ids("<|s_0|>")
        given = [voices[r["voice"]] for r in part]
        prompts = tokenizer.apply_chat_template([prompt(f"{v['text']} {r['text']}", v["tokens"]) for v, r in zip(
            given, part)], tokenize=False, continue_final_message=True)
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(device)
        torch.manual_seed(0)
        out = model.generate(**inputs, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=250)
        out = out[:, inputs.input_ids.shape[1]:].cpu().numpy() - first
        codes = [row[row >= 0][:250] for row in out]
        waves = decode_tokens(codec, [c if len(c) else np.zeros(1, dtype=np.int64) for c in codes])
        judges = [Judge(f"{CHECKPOINTS}/{reader}", pick_device(args.device)) for reader in ("asr", "asr2")]
        wers = [jiwer.wer([r["text"] for r in part], judge.transcribe(waves)) for judge in judges]
        print(f"{folder}: sampled WER {100 * wers[0]:.1f} % by asr, {100 * wers[1]:.1f} % by asr2; tokens over those "
              f"spoken {sum(map(len, codes)) / sum(len(r['tokens']) for r in part):.3f}", flush=True)


# ---- texts, voices and tests of chapters 2 and 3 ----------------------------------------------------------

def build_texts(args):
    """Writes data/tts/: train.jsonl (sentences for RL, with a recording's speech tokens), dev/ and test/plain/ (others,
    with their recordings, to choose by and to test on) and voices/ (a short reference recording of every voice). No
    sentence stands in two of them, or in supervised training."""
    rng, taken = np.random.default_rng([args.seed, 17]), set()
    short = sorted([t for t, _ in corpus.unique_sentences(rng, 400, taken)], key=len)[:len(TTS_VOICES)]
    train, test, dev = ([t for t, _ in corpus.unique_sentences(rng, n, taken)] for n in (400, 100, 60))
    (DATA / "tts").mkdir(parents=True, exist_ok=True)
    spoken = [(TTS_VOICES[i % len(TTS_VOICES)], say((text, TTS_VOICES[i % len(TTS_VOICES)], i)))
              for i, text in enumerate(train)]
    codes = encode_waves(load_codec(pick_device(args.device)), torch.from_numpy(np.concatenate([w for _, w in spoken])),
                         torch.tensor([len(w) for _, w in spoken]))
    with open(DATA / "tts" / "train.jsonl", "w", encoding="utf-8") as out:
        for text, (voice, _), row in zip(train, spoken, codes):
            out.write(json.dumps({"text": text, "voice": voice[1], "tokens": row.tolist()}) + "\n")
    for name, texts in (("voices", short), ("dev", dev), ("test/plain", test)):
        rows = [(text, text, corpus.keywords_in(text), TTS_VOICES[i % len(TTS_VOICES)], None, "", i)
                for i, text in enumerate(texts)]
        waves = [say((row[0], row[3], row[6])).astype(np.float32) / 32768 for row in rows]
        corpus.write_set(DATA / "tts" / name, rows, waves)
    print(f"texts: {len(train)} sentences for RL, {len(dev)} to choose by, {len(test)} to test on; {len(short)} voices")


# ---- Token2Text --------------------------------------------------------------------------------------------

def train_token2text(args):
    """Trains log P(text | speech tokens) on any folder of "text" and "tokens" (--tokens): a small mBART whose encoder
    reads embeddings, so that a mixture of codes is read like a single one.

    It trains with the noise it will meet as a reward: mixtures of codes, masked and swapped codes. A CTC head on the
    encoder, for training alone, teaches it where in the speech the letters are: without it 3,000 steps left 91 % WER.
    """
    device, started = pick_device(args.device), time.time()
    rows = read_tokens(args.tokens or BUILD / "tokens")
    codes = max(max(r["tokens"]) for r in rows if r["tokens"]) + 1
    if args.tokens is None:
        codes = math.prod(Xcodec2Config.from_pretrained(CHECKPOINTS / "codec").quantization_levels)
    tokenizer = build_tokenizer(codes)
    first, pad, end = tokenizer.convert_tokens_to_ids("<|s_0|>"), tokenizer.pad_token_id, tokenizer.eos_token_id
    text = [tokenizer(r["text"], add_special_tokens=False).input_ids + [end] for r in rows]
    speech = [np.array(r["tokens"]) + first for r in rows]
    torch.manual_seed(2)
    longest = max(map(len, speech + text))
    model = MBartForConditionalGeneration(MBartConfig(
        vocab_size=len(tokenizer), d_model=160, encoder_layers=4, decoder_layers=2, encoder_ffn_dim=640,
        decoder_ffn_dim=320, encoder_attention_heads=4, decoder_attention_heads=4, dropout=0.1,
        max_position_embeddings=max(512, 2 * longest), pad_token_id=pad, eos_token_id=end,
        bos_token_id=tokenizer.bos_token_id, is_encoder_decoder=True, decoder_start_token_id=end,
        forced_eos_token_id=None, first_speech_token=first))
    if args.go_on:
        model = MBartForConditionalGeneration.from_pretrained(CHECKPOINTS / "token2text", dtype=torch.float32)
    model.to(device).train()
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad, decoder_start_token_id=end)
    blank = 256                                                  # behind the bytes
    ctc_head = torch.nn.Linear(model.config.d_model, blank + 1).to(device)
    weights = [*model.parameters(), *ctc_head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=7e-4, betas=(0.9, 0.98), weight_decay=0.01, fused=device.type == "cuda")
    steps = args.token2text_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / max(1, steps // 10)) * (
        0.5 * (1 + math.cos(math.pi * min(1, s / steps))) + 1e-3))
    rng, held = np.random.default_rng(7), 256

    def pack(lists, fill):
        out = np.full((len(lists), max(map(len, lists))), fill)
        for k, row in enumerate(lists):
            out[k, :len(row)] = row
        return torch.from_numpy(out).to(device)

    def loss_on(index, noise):
        ids, labels = pack([speech[i] for i in index], pad), pack([text[i] for i in index], -100)
        table, mask = model.get_input_embeddings().weight, ids != pad
        shape = ids.shape
        other = torch.randint(first, first + codes, shape, device=device)
        draw = torch.rand(shape, device=device)
        share = torch.where(draw < 0.05, 1.0, torch.where(draw < 0.35, 0.7 * torch.rand(shape, device=device), 0.0))
        share = (share * noise)[..., None]                       # 5 % swapped, 30 % mixtures
        embeds = (1 - share) * table[ids] + share * table[other]
        embeds = embeds * ((draw < 0.95) | (noise == 0))[..., None]   # 5 % masked
        out = model(inputs_embeds=embeds, attention_mask=mask.long(), labels=labels)
        heard = torch.log_softmax(ctc_head(out.encoder_last_hidden_state).float(), dim=-1)      # (N, T, 257)
        targets = [torch.tensor(text[i][:-1]) for i in index]
        ctc = torch.nn.functional.ctc_loss(
            heard.transpose(0, 1), torch.cat(targets).to(device), mask.sum(dim=1).cpu(),
            torch.tensor([len(t) for t in targets]), blank=blank, zero_infinity=True)
        return out.loss, ctc

    for step in range(1, steps + 1):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, ctc = loss_on(rng.integers(held, len(rows), size=args.batch), rng.random() < 0.9)
        optimizer.zero_grad(set_to_none=True)
        (loss + 0.5 * ctc).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 10) == 0 or step == steps:
            model.eval()
            with torch.inference_mode():
                check = float(loss_on(np.arange(held), 0)[0])
            model.train()
            print(f"token2text step {step} loss {float(loss.detach()):.4f} unseen {check:.4f} ctc "
                  f"{float(ctc.detach()):.3f} {time.time() - started:.0f} s", flush=True)
            copy.deepcopy(model).to(torch.bfloat16).save_pretrained(CHECKPOINTS / "token2text")
            tokenizer.save_pretrained(CHECKPOINTS / "token2text")
    wer = token2text_wer(model.eval().to(torch.bfloat16).float(), tokenizer, rows[:held])
    print(f"token2text: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, WER on unseen tokens "
          f"{100 * wer:.2f} %, {time.time() - started:.0f} s")


@torch.inference_mode()
def token2text_wer(model, tokenizer, rows):
    """Greedy word error rate on rows of "text" and "tokens"."""
    first, found = tokenizer.convert_tokens_to_ids("<|s_0|>"), []
    for start in range(0, len(rows), 64):
        part = rows[start:start + 64]
        lists = [torch.tensor(r["tokens"]) + first for r in part]
        ids = torch.nn.utils.rnn.pad_sequence(lists, batch_first=True, padding_value=tokenizer.pad_token_id)
        mask = (ids != tokenizer.pad_token_id).long()
        out = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), do_sample=False,
                             num_beams=1, max_new_tokens=150)
        found += tokenizer.batch_decode(out, skip_special_tokens=True)
    return jiwer.wer([r["text"] for r in rows], [f.strip() for f in found])


# ---- speaker model -----------------------------------------------------------------------------------------

def train_speaker(args, seconds=1.6, batch=64):
    """A small `WavLMForXVector` on random cuts of build/voices.pt, half of them after the codec: which of its voices
    is it?"""
    data = torch.load(BUILD / "voices.pt", weights_only=True, mmap=True)
    device, started = pick_device(args.device), time.time()
    names = sorted(set(data["voice"]))
    label = torch.tensor([names.index(v) for v in data["voice"]])
    lengths, size = data["lengths"], int(seconds * RATE)
    offsets = torch.cumsum(lengths, 0) - lengths
    samples, codec = data["samples"].to(device), load_codec(device)
    torch.manual_seed(3)
    model = WavLMForXVector(WavLMConfig(
        hidden_size=96, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, conv_dim=[48] * 7,
        num_conv_pos_embeddings=32, num_conv_pos_embedding_groups=8, tdnn_dim=[96, 96, 96, 96, 192],
        xvector_output_dim=96, num_labels=len(names), layerdrop=0.0, mask_time_prob=0.0, feat_extract_norm="group",
        apply_spec_augment=False, use_weighted_layer_sum=False)).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    steps, generator = args.speaker_steps, torch.Generator().manual_seed(3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 100) * 0.5 * (
        1 + math.cos(math.pi * min(1, s / steps))) + 1e-3)
    by_voice = [(label[:-500] == k).nonzero()[:, 0] for k in range(len(names))]

    def cut(rows, coded):
        """Cuts of these rows, the first `coded` of them as the codec says them: (N, samples), unit variance."""
        room = (lengths[rows] - size).clamp(min=0)
        start = offsets[rows] + (torch.rand(len(rows), generator=generator) * room).long()
        at = (start[:, None] + torch.arange(size)).clamp(max=len(samples) - 1)
        x = samples[at.to(device)].float() / 32768
        if coded:
            with torch.no_grad():
                codes = quantise(codec, x[:coded])[1]
                x = torch.cat([codec.decode(codes[:, None]).audio_values[:, 0], x[coded:]])
        return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)

    for step in range(1, steps + 1):
        chosen = torch.randint(len(names), (batch,), generator=generator)
        rows = torch.stack([by_voice[k][torch.randint(len(by_voice[k]), (), generator=generator)] for k in chosen])
        x = cut(rows, batch // 2) + 0.02 * torch.rand(()) * torch.randn(batch, size, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(x, labels=label[rows].to(device)).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 8) == 0:
            print(f"speaker step {step} loss {float(loss.detach()):.3f} {time.time() - started:.0f} s", flush=True)
    model.eval()
    last, found = torch.arange(len(lengths) - 500, len(lengths)), []
    with torch.inference_mode():
        for coded in (0, 100):
            parts = [model(cut(part, coded)).embeddings.float() for part in last.split(100)]
            found.append(torch.nn.functional.normalize(torch.cat(parts), dim=-1).cpu())
    same = label[last][:, None] == label[last]
    apart = same.clone().fill_diagonal_(False)
    model.to(torch.bfloat16).cpu().save_pretrained(CHECKPOINTS / "speaker")
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(CHECKPOINTS / "speaker")
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"speaker: {size:.2f}M parameters, {time.time() - started:.0f} s; cosine of unseen clips, same "
          "voice and others: " + ", ".join(
              f"{name} {(a @ b.T)[apart].mean():.3f} and {(a @ b.T)[~same].mean():.3f}" for name, a, b in (
                  ("as spoken", found[0], found[0]), ("after the codec", found[1], found[1]),
                  ("one against the other", *found))))
