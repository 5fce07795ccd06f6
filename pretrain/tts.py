"""The other models of chapters 2 and 3: an LLM that speaks, a speaker model, a Token2Text model; and their texts.

The stages, called by `python -m pretrain STAGE`, in this order:
    tts          the LLM of chapter 2: text and a voice in, speech tokens out      checkpoints/tts
    token2text   the reward model of DiffRO: log P(text | soft speech tokens)      checkpoints/token2text
    speaker      whose voice is it: x-vectors                                      checkpoints/speaker
    texts        sentences for RL, test recordings, a reference of every voice     data/tts
Everything here is our choice; the classes are those of the published checkpoints.
"""
import copy
import functools
import json
import math
import time
from pathlib import Path

import jiwer
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
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
)

from engine.run import pick_device
from pretrain import asr, corpus, parts
from pretrain.codec import encode_waves, load_codec, quantise
from pretrain.graph import graphed_by_shape, up_to
from pretrain.parts import HELD, pace

CHECKPOINTS, DATA = Path("checkpoints"), Path("data")
RATE = corpus.SAMPLE_RATE
TTS_VOICES = [name for _, name in corpus.TTS_VOICES]
# The prompt of Llasa, as the chat template of its tokenizer renders it.
CHAT_TEMPLATE = r"""{{ '<|begin_of_text|>' }}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content }}
{%- if not (loop.last and continue_final_message) -%}{{ '<|eot_id|>' }}{%- endif -%}
{%- endfor -%}"""
SPECIAL = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|finetune_right_pad_id|>",
           "<|TEXT_UNDERSTANDING_START|>", "<|TEXT_UNDERSTANDING_END|>", "<|SPEECH_GENERATION_START|>",
           "<|SPEECH_GENERATION_END|>"]


# ---- the LLM that speaks -----------------------------------------------------------------------------------

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
    """Supervised training of the speaking LLM on build/tokens: pairs of one voice, the first, a short one, is the
    reference.

    A CTC head on what the LLM makes of the speech so far, for training alone, asks it which letters were said: so it
    learns early where in the text it is. Without it 4,200 steps left 96 % WER on everyday sentences.
    """
    device, started = pick_device(args.device), time.time()
    codes = math.prod(Xcodec2Config.from_pretrained(CHECKPOINTS / "codec").quantization_levels)
    tokenizer = build_tokenizer(codes)
    first, end = (tokenizer.convert_tokens_to_ids(t) for t in ("<|s_0|>", "<|SPEECH_GENERATION_END|>"))
    frame = tokenizer.apply_chat_template(prompt("@", []), tokenize=False, continue_final_message=True)
    before, after = (tokenizer(half, add_special_tokens=False).input_ids for half in frame.split("@"))
    space = tokenizer(" ", add_special_tokens=False).input_ids
    rows, text, speech, lengths, references, seen, held = [], [], [], None, {}, set(), set()

    def take():
        """Adds the parts that have come since; whether there were any."""
        nonlocal lengths
        before = len(rows)
        for part, found in parts.come("tokens", seen):
            if part == 0:
                held.update(row["text"] for row in found[:HELD])
            own = [row for row in found if row["voice"] in TTS_VOICES and row["text"] not in held]
            rows.extend(own)
            text.extend(tokenizer([row["text"] for row in own], add_special_tokens=False).input_ids)
            speech.extend((np.array(row["tokens"]) + first).tolist() for row in own)
        lengths = np.array([len(row) for row in speech])
        for voice in TTS_VOICES:                                          # of each voice the shorter third
            own = np.array([i for i, row in enumerate(rows) if row["voice"] == voice])
            references[voice] = own[np.argsort(lengths[own], kind="stable")][:1 + len(own) // 3]
        return len(rows) > before

    parts.wait_for_first(args, "tokens")
    take()
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=320, intermediate_size=960, num_hidden_layers=8, num_attention_heads=5,
        num_key_value_heads=5, max_position_embeddings=2048, tie_word_embeddings=True, attention_dropout=0.0,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=tokenizer.pad_token_id)).to(device).train()
    if args.go_on:
        model = LlamaForCausalLM.from_pretrained(CHECKPOINTS / "tts", dtype=torch.float32).to(device).train()
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=tokenizer.pad_token_id)
    ctc_head = torch.nn.Linear(model.config.hidden_size, 257).to(device)                     # bytes and the blank
    weights = [*model.parameters(), *ctc_head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=args.tts_lr, betas=(0.9, 0.98), weight_decay=0.1,
                                  fused=device.type == "cuda")
    rng = np.random.default_rng(5)
    ctc = functools.partial(torch.nn.functional.ctc_loss, blank=256, zero_infinity=True)

    def sequence(i):
        """Tokens; how many of them, at the end, are to be said; where speech starts; the letters of all of it."""
        said, spoken = text[i], speech[i]
        if rng.random() < 0.9:
            pool = references[rows[i]["voice"]]
            j = pool[rng.integers(len(pool))]
            said, spoken = text[j] + space + said, speech[j] + spoken
        start = len(before) + len(said) + len(after)
        return before + said + after + spoken + [end], len(speech[i]) + 1, start, said

    def batches(count, sorted_over=16):
        """Rows of about the same length."""
        while True:
            order = rng.permutation(len(rows))
            for start in range(0, len(order), count * sorted_over):
                chunk = order[start:start + count * sorted_over]
                chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
                few = [chunk[i:i + count] for i in range(0, len(chunk), count)]
                yield from ([sequence(i) for i in few[k]] for k in rng.permutation(len(few)))

    def hear(ids):
        """Tokens (N, L), padded on the right, where no token sees it: what the LLM makes of them (N, L, D)."""
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return model.model(input_ids=ids, use_cache=False).last_hidden_state

    def losses(sequences):
        """Cross-entropy of the tokens to be said, CTC of the letters."""
        ids, counts, starts, letters = zip(*sequences)
        sizes, counts, starts = torch.tensor([*map(len, ids)]), torch.tensor(counts), torch.tensor(starts)
        full = np.full((len(ids), int(sizes.max())), tokenizer.pad_token_id)
        for i, row in enumerate(ids):
            full[i, :len(row)] = row
        full = torch.from_numpy(full)
        span = torch.arange(int(counts.max()))
        at = (sizes - counts - 1)[:, None] + span                                    # where each of them is foretold
        labels = torch.where(span < counts[:, None], full.gather(1, (at + 1).clamp(max=full.shape[1] - 1)), -100)
        heard = starts[:, None] + torch.arange(int((sizes - 1 - starts).max()))      # where speech is
        at, heard = (t.clamp(max=full.shape[1] - 1).to(device) for t in (at, heard))
        full = full.to(device)
        # some speech tokens read are not those said: what sampling will do to the context
        wrong = (torch.rand(full.shape, device=device) < 0.05) & (full >= first)
        hidden = run(torch.where(wrong, torch.randint_like(full, first, first + codes), full))
        here = lambda where: hidden.gather(1, where[..., None].expand(-1, -1, hidden.shape[2]))  # noqa: E731
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits, said = model.lm_head(here(at)), ctc_head(here(heard))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten().to(device))
        return loss, ctc(torch.log_softmax(said.float(), dim=-1).transpose(0, 1),
                         torch.tensor(sum(letters, []), device=device), sizes - 1 - starts,
                         torch.tensor([*map(len, letters)]))

    run = torch.compile(hear, dynamic=True) if device.type == "cuda" else hear
    stream = batches(args.tts_batch)
    for step, done in pace(args, args.tts_steps):
        if step % 100 == 0 and take():
            stream = batches(args.tts_batch)
        for group in optimizer.param_groups:
            group["lr"] = args.tts_lr * min(1, step / 400) * (0.5 + 0.5 * math.cos(math.pi * done))
        loss, aligned = losses(next(stream))
        optimizer.zero_grad(set_to_none=True)
        (loss + 0.3 * aligned).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step % 500 == 0 or step == 20 or done == 1:
            print(f"tts step {step} loss {float(loss.detach()):.4f} ctc {float(aligned.detach()):.3f} "
                  f"{time.time() - started:.0f} s", flush=True)
        if step % 1000 == 0 or done == 1:
            tokenizer.save_pretrained(CHECKPOINTS / "tts")
            copy.deepcopy(model).to(torch.bfloat16).save_pretrained(CHECKPOINTS / "tts")
    print(f"tts: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {len(rows)} recordings, "
          f"{step} steps, {time.time() - started:.0f} s")


# ---- texts, voices and tests of chapters 2 and 3 ----------------------------------------------------------

def build_texts(args, longest=6.0):
    """Writes data/tts/: train.jsonl (sentences for RL of up to `longest` seconds, with a recording's speech tokens),
    dev (which chooses the best adapter), test/plain and test/hard, with recordings, and voices/ (a short reference
    recording of every voice). The sentences were written for this project; training says none of them."""
    plain, hard = corpus.own_sentences("plain"), corpus.own_sentences("hard")
    rng, voices = np.random.default_rng([args.seed, 17]), corpus.TTS_VOICES
    sets = {"train": plain[200:] + plain[130:160] + hard[60:], "dev": plain[100:130] + hard[50:60],
            "test/plain": plain[:100], "test/hard": hard[:50],
            "voices": sorted(plain[160:200], key=len)[10:10 + len(voices)]}
    sets["train"] = [sets["train"][i] for i in rng.permutation(len(sets["train"]))]
    rows = [(text, text, [], voices[i % len(voices)], None, "", i, name) for name, texts in sets.items()
            for i, text in enumerate(texts)]
    waves = asr.in_parallel(asr.voiced_alone, [row[:-1] for row in rows], args.workers, chunk=16)
    of = {name: [i for i, row in enumerate(rows) if row[-1] == name] for name in sets}
    samples = [torch.from_numpy(np.round(waves[i] * 32767).astype(np.int16)) for i in of["train"]]
    codes = encode_waves(load_codec(pick_device(args.device)), torch.cat(samples), torch.tensor([*map(len, samples)]))
    (DATA / "tts").mkdir(parents=True, exist_ok=True)
    with open(DATA / "tts" / "train.jsonl", "w", encoding="utf-8") as out:
        for i, row in [(i, row) for i, row in zip(of["train"], codes) if len(waves[i]) <= longest * RATE]:
            out.write(json.dumps({"text": rows[i][0], "voice": rows[i][3][1], "tokens": row.tolist()}) + "\n")
    for name in list(sets)[1:]:
        corpus.write_set(DATA / "tts" / name, [rows[i][:-1] for i in of[name]], [waves[i] for i in of[name]])
    print("texts: " + ", ".join(f"{name} {len(texts)}" for name, texts in sets.items()))


# ---- Token2Text --------------------------------------------------------------------------------------------

def train_token2text(args):
    """Trains log P(text | speech tokens) on any folder of "text" and "tokens" (--tokens): a small mBART whose encoder
    reads embeddings, so that a mixture of codes is read like a single one.

    It trains with the noise it will meet as a reward: mixtures of codes, masked and swapped codes. A CTC head on the
    encoder, for training alone, teaches it where in the speech the letters are: without it 3,000 steps left 91 % WER.
    """
    device, started = pick_device(args.device), time.time()
    if args.tokens:
        codes = max(max(row["tokens"]) for row in parts.read_tokens(args.tokens) if row["tokens"]) + 1
    else:
        parts.wait_for_first(args, "tokens")
        codes = math.prod(Xcodec2Config.from_pretrained(CHECKPOINTS / "codec").quantization_levels)
    tokenizer = build_tokenizer(codes)
    first, pad, end = tokenizer.convert_tokens_to_ids("<|s_0|>"), tokenizer.pad_token_id, tokenizer.eos_token_id
    rows, text, speech, seen = [], [], [], set()                    # the first are for checking

    def take():
        """Adds the parts that have come since; whether there were any."""
        new = sum((found for _, found in parts.come("tokens", seen)), []) if not args.tokens else (
            parts.read_tokens(args.tokens) if not rows else [])
        held_texts = {row["text"] for row in (rows or new)[:HELD]} if not args.tokens else ()
        new = [row for i, row in enumerate(new) if row["text"] not in held_texts or not rows and i < HELD]
        if not new:
            return False
        rows.extend(new)
        text.extend(ids + [end] for ids in tokenizer([row["text"] for row in new], add_special_tokens=False).input_ids)
        speech.extend(np.array(row["tokens"]) + first for row in new)
        return True

    take()
    torch.manual_seed(2)
    longest = max(map(len, speech + text))
    model = MBartForConditionalGeneration(MBartConfig(
        vocab_size=len(tokenizer), d_model=192, encoder_layers=5, decoder_layers=2, encoder_ffn_dim=768,
        decoder_ffn_dim=384, encoder_attention_heads=4, decoder_attention_heads=4, dropout=0.1,
        max_position_embeddings=max(512, 2 * longest), pad_token_id=pad, eos_token_id=end,
        bos_token_id=tokenizer.bos_token_id, is_encoder_decoder=True, decoder_start_token_id=end,
        forced_eos_token_id=None, first_speech_token=first))
    if args.go_on:
        model = MBartForConditionalGeneration.from_pretrained(CHECKPOINTS / "token2text", dtype=torch.float32)
    model.to(device).train()
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad, decoder_start_token_id=end)
    blank = 256                                                  # behind the bytes
    ctc_head = torch.nn.Linear(model.config.d_model, blank + 1).to(device)
    weights, lr = [*model.parameters(), *ctc_head.parameters()], 7e-4
    optimizer = torch.optim.AdamW(weights, lr=torch.tensor(lr, device=device), betas=(0.9, 0.98), weight_decay=0.01,
                                  fused=device.type == "cuda", capturable=device.type == "cuda")
    rng, held = np.random.default_rng(7), min(HELD, len(rows) // 4)

    def pack(lists, fill):
        out = np.full((len(lists), up_to(max(map(len, lists)), 32)), fill)
        for k, row in enumerate(lists):
            out[k, :len(row)] = row
        return torch.from_numpy(out).to(device)

    def read(ids, labels, noise):
        """Tokens (N, T), letters (N, S), in noise where `noise` is 1 -> the loss, what the encoder gives (N, T, D)."""
        table, mask = model.get_input_embeddings().weight, ids != pad
        draw, other = torch.rand(ids.shape, device=device), torch.randint_like(ids, first, first + codes)
        share = torch.where(draw < 0.05, 1.0, torch.where(draw < 0.35, 0.7 * torch.rand_like(draw), 0.0))
        share = (share * noise)[..., None]                       # 5 % swapped, 30 % mixtures
        embeds = (1 - share) * table[ids] + share * table[other]
        embeds = embeds * ((draw < 0.95) | (noise == 0))[..., None]   # 5 % masked
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            out = model(inputs_embeds=embeds, attention_mask=mask.long(), labels=labels, use_cache=False)
        return out.loss, out.encoder_last_hidden_state

    def ctc_loss(encoded, ids, index):
        heard = torch.log_softmax(ctc_head(encoded.float()), dim=-1)                                 # (N, T, 257)
        targets = [torch.tensor(text[i][:-1]) for i in index]
        return torch.nn.functional.ctc_loss(
            heard.transpose(0, 1), torch.cat(targets).to(device), (ids != pad).sum(dim=1).cpu(),
            torch.tensor([len(t) for t in targets]), blank=blank, zero_infinity=True)

    def train(ids, labels, noise, index=None):
        loss, encoded = read(ids, labels, noise)
        total = loss if index is None else loss + 0.5 * ctc_loss(encoded, ids, index)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        return loss.detach()

    def batches(count):
        """Rows of about the same length."""
        sizes, theirs = np.array([up_to(len(row), 32) for row in speech]), np.arange(held, len(rows))
        while True:
            few = []
            for longest in np.unique(sizes[held:]):
                own, most = rng.permutation(theirs[sizes[held:] == longest]), max(1, min(count, 192 * count // longest))
                few += [own[i:i + most] for i in range(0, len(own) - most + 1, most)]
            yield from (few[i] for i in rng.permutation(len(few)))

    def given(index, noise):
        return (pack([speech[i] for i in index], pad), pack([text[i] for i in index], -100),
                torch.tensor(float(noise), device=device))

    most = min(args.token2text_batch, len(rows) - held)
    stream, one_step, aligned = batches(most), graphed_by_shape(train), 0 if args.go_on else 0.25
    for step, done in pace(args, args.token2text_steps):
        if step % 100 == 0 and take():
            stream = batches(most)
        index = next(stream)
        optimizer.param_groups[0]["lr"].fill_(lr * min(1, step / 400) * (0.5 + 0.5 * math.cos(math.pi * done)))
        now = given(index, rng.random() < 0.9)
        loss = train(*now, index=index) if done <= aligned else one_step(*now)    # who listens needs CTC no more
        if step % 500 == 0 or step == 20 or done == 1:
            model.eval()
            with torch.inference_mode():
                check = float(read(*given(np.arange(held), 0))[0])
            model.train()
            print(f"token2text step {step} loss {float(loss):.4f} unseen {check:.4f} {time.time() - started:.0f} s",
                  flush=True)
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
    """A small `WavLMForXVector` on random cuts of build/speech, half of them after the codec: which of its voices
    is it?"""
    data = parts.all_speech()
    device, started = pick_device(args.device), time.time()
    names = sorted(set(data["voice"][:-HELD]))
    label = torch.tensor([names.index(v) if v in names else -1 for v in data["voice"]])
    lengths, size = data["lengths"], int(seconds * RATE)
    offsets = torch.cumsum(lengths, 0) - lengths
    samples, codec = data["samples"].to(device), load_codec(device)
    torch.manual_seed(3)
    model = WavLMForXVector(WavLMConfig(
        hidden_size=96, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, conv_dim=[48] * 7,
        num_conv_pos_embeddings=32, num_conv_pos_embedding_groups=8, tdnn_dim=[96, 96, 96, 96, 192],
        xvector_output_dim=96, num_labels=len(names), layerdrop=0.0, mask_time_prob=0.0, feat_extract_norm="group",
        apply_spec_augment=False, use_weighted_layer_sum=False)).to(device).train()
    if args.go_on:
        model = WavLMForXVector.from_pretrained(CHECKPOINTS / "speaker", dtype=torch.float32).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    steps, generator = args.speaker_steps, torch.Generator().manual_seed(3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 100) * 0.5 * (
        1 + math.cos(math.pi * min(1, s / steps))) + 1e-3)
    by_voice = [(label[:-HELD] == k).nonzero()[:, 0] for k in range(len(names))]

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
    last, found = torch.arange(len(lengths) - HELD, len(lengths)), []
    with torch.inference_mode():
        for coded in (0, 64):
            heard = [model(cut(part, coded)).embeddings.float() for part in last.split(64)]
            found.append(torch.nn.functional.normalize(torch.cat(heard), dim=-1).cpu())
        centres = torch.stack([torch.nn.functional.normalize(model(cut(own[:64], 0)).embeddings.float(), dim=-1).mean(0)
                               for own in by_voice]).cpu()
    right = [(embedding @ centres.T).argmax(1) == label[last] for embedding in found]
    spoken = torch.tensor([names[k] in TTS_VOICES for k in label[last]])
    same = label[last][:, None] == label[last]
    apart = same.clone().fill_diagonal_(False)
    model.to(torch.bfloat16).cpu().save_pretrained(CHECKPOINTS / "speaker")
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(CHECKPOINTS / "speaker")
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print("speaker: nearest voice right as spoken, after the codec: " + ", ".join(
        f"{100 * r.float().mean():.1f} % (voices of the LLM {100 * r[spoken].float().mean():.1f})" for r in right))
    print(f"speaker: {size:.2f}M parameters, {time.time() - started:.0f} s; cosine of unseen clips, same "
          "voice and others: " + ", ".join(
              f"{name} {(a @ b.T)[apart].mean():.3f} and {(a @ b.T)[~same].mean():.3f}" for name, a, b in (
                  ("as spoken", found[0], found[0]), ("after the codec", found[1], found[1]),
                  ("one against the other", *found))))
