"""What the recognisers differ in, in one place: how each is asked, how it hears and how it answers.

All of them are an audio tower, a projector and an LLM (`language_model`), and the LLM reads a prompt in which audio
embeddings stand in the places of `audio_token_id`. So the scripts need no more than

    ask(processor, waves, language)    waveforms -> the class's own inputs, prompts padded on the left
    collate(processor, clips, ...)     the same for a batch of data.py, with clear words for a user's mistake
    embed(model, inputs)               inputs -> prompt embeddings (B, L, D), audio in its places
    answers(processor, rows)           token ids -> transcripts
    settle(model)                      what must be put right in a model before it is used

The rows of `RECOGNISERS` are tried on transformers 5.23. Whisper is an encoder-decoder: a judge, never a policy.
"""
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForMultimodalLM, AutoModelForSpeechSeq2Seq, BatchFeature

from engine.audio import DataError, reason
from engine.text import language_code

# the prompts that IBM's model card and Qwen's evaluation code give for transcription
GRANITE = [{"role": "system", "content": "Knowledge Cutoff Date: April 2024.\nToday's Date: April 9, 2025.\n"
            "You are Granite, developed by IBM. You are a helpful AI assistant"},
           {"role": "user", "content": "<|audio|>can you transcribe the speech into a written format?"}]
QWEN2_AUDIO = "Detect the language and recognize the speech: <|{}|>"


# ---- asked ----------------------------------------------------------------------------------------------------

def ask_qwen3_asr(processor, waves, language, keywords):
    contexts = [", ".join(words) or None for words in keywords] if keywords else [None] * len(waves)
    return batch([processor.apply_transcription_request(wave, language=language, prompt=context)   # its system prompt
                  for wave, context in zip(waves, contexts)], processor.tokenizer.pad_token_id, time=1)


def ask_qwen2_audio(processor, waves, language, keywords):
    said = [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": QWEN2_AUDIO.format(language)}]}]
    text = processor.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    return processor(text=[text] * len(waves), audio=waves, padding=True, return_tensors="pt")


def ask_granite_speech(processor, waves, language, keywords):
    text = processor.tokenizer.apply_chat_template(GRANITE, tokenize=False, add_generation_prompt=True)
    rows = [processor(text=text, audio=wave, return_tensors="pt") for wave in waves]
    inputs = batch(rows, processor.tokenizer.pad_token_id, time=0)
    inputs["frames"] = torch.tensor([row["input_features"].shape[1] for row in rows])   # (B,), for its encoder
    return inputs


def batch(rows, pad_id, time):
    """Inputs of single clips -> one batch; `time` is the axis of time in a clip's features.

    Beside a longer clip the extractors of Qwen3-ASR and Granite in transformers 5.23 give a clip other features at
    its end than alone (silence for nothing, no reflection), and Qwen3-ASR sometimes one place more.
    """
    def pad(name, value=0, side="right", axis=0):
        return torch.nn.utils.rnn.pad_sequence(
            [row[name][0].movedim(axis, 0) for row in rows], True, value, side).movedim(1, axis + 1)

    return BatchFeature(dict(
        input_ids=pad("input_ids", pad_id, "left"), attention_mask=pad("attention_mask", 0, "left"),
        input_features=pad("input_features", axis=time), input_features_mask=pad("input_features_mask")))


# ---- heard: features -> audio embeddings (places, D), clip after clip --------------------------------------------

def hear_masked(model, inputs, features):
    return model.get_audio_features(features, inputs["input_features_mask"]).pooler_output


def hear_granite_speech(model, inputs, features):
    """Clip by clip: its encoder knows no padding."""
    clips = [clip[None, :count] for clip, count in zip(features, inputs["frames"])]
    return torch.cat([model.get_audio_features(clip).pooler_output[0] for clip in clips])


def hear_qwen2_audio(model, inputs, features):
    """What the others call get_audio_features stands in the middle of this class's forward."""
    tower, mask = model.model.audio_tower, inputs["feature_attention_mask"]
    frames, places = tower._get_feat_extract_output_lengths(mask.sum(dim=1))
    below = lambda counts, most: torch.arange(most, device=mask.device) < counts[:, None]  # noqa: E731
    hidden = torch.zeros(len(mask), 1, 1, mask.shape[1] // 2, device=mask.device, dtype=features.dtype)
    hidden.masked_fill_(~below(frames, hidden.shape[-1])[:, None, None], torch.finfo(hidden.dtype).min)
    audio = model.model.multi_modal_projector(tower(features, attention_mask=hidden).last_hidden_state)
    return audio[below(places, audio.shape[1])]


# ---- the table --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Recogniser:
    ask: Callable                       # (processor, waves, language, keywords) -> inputs
    hear: Callable | None               # (model, inputs, features) -> audio embeddings; None: has an own decoder
    keywords: bool = False              # whether its prompt has a place for them
    before: str = ""                    # pattern of what may come before the transcript
    loader: type = AutoModelForMultimodalLM


RECOGNISERS = {
    "FunAsrNano": Recogniser(
        lambda processor, waves, language, keywords: processor.apply_transcription_request(
            waves, language=language, keywords=keywords, processor_kwargs={"padding": True}),
        hear_masked, keywords=True),
    "Qwen3ASR": Recogniser(ask_qwen3_asr, hear_masked, keywords=True, before=r"language [A-Za-z ]+<asr_text>"),
    "GlmAsr": Recogniser(
        lambda processor, waves, language, keywords: processor.apply_transcription_request(waves), hear_masked),
    "GraniteSpeech": Recogniser(ask_granite_speech, hear_granite_speech),
    "Voxtral": Recogniser(
        lambda processor, waves, language, keywords: processor.apply_transcription_request(
            waves, language=language, model_id="voxtral", format="wav", sampling_rate=rate(processor)),
        lambda model, inputs, features: model.get_audio_features(features).pooler_output),  # whole windows of 30 s
    "Qwen2Audio": Recogniser(ask_qwen2_audio, hear_qwen2_audio),
    "Whisper": Recogniser(
        lambda processor, waves, language, keywords: processor(
            waves, sampling_rate=rate(processor), return_tensors="pt", return_attention_mask=True),
        None, loader=AutoModelForSpeechSeq2Seq),
}


def recogniser(thing):
    """The row of a processor or a model, None where there is none."""
    return RECOGNISERS.get(re.sub("(Processor|ForConditionalGeneration)$", "", type(thing).__name__))


def rate(processor):
    """Samples a second of the waveforms that `ask` takes."""
    return getattr(processor, "feature_extractor", getattr(processor, "audio_processor", None)).sampling_rate


def ask(processor, waves, language, keywords=None):
    """Waveforms (samples,) -> the class's inputs for a batch; ValueError for a language that it does not know."""
    return recogniser(processor).ask(processor, waves, language_code(language), keywords)


def collate(processor, utterances, language):
    """The processor's inputs for a batch: `input_ids` (B, L) padded on the left, `input_features` (Fun-ASR-Nano: B,
    frames, 560) and their masks. Where utterances have a keyword list, it goes into their prompts."""
    lists = [u.listed for u in utterances]
    keywords = None if None in lists else [list(words) for words in lists]
    if keywords and not recogniser(processor).keywords:
        raise DataError(f"--hotwords: the prompt of a {type(processor).__name__} has no place for keywords")
    waves = [u.waveform(rate(processor)) for u in utterances]
    try:
        return ask(processor, waves, language, keywords)
    except ValueError as error:
        raise DataError(f"--language {language}: the model's processor refuses it ({error})") from None
    except ImportError as error:                                                    # Voxtral's needs mistral-common
        raise DataError(f"a {type(processor).__name__}: {reason(error)}") from None


def embed(model, inputs):
    """The inputs of a batch as prompt embeddings (B, L, D), audio in its places."""
    here = inputs["input_ids"] == model.config.audio_token_id                       # (B, L)
    embeds = model.get_input_embeddings()(inputs["input_ids"].masked_fill(here, 0))  # the id may be beyond the table
    audio = recogniser(model).hear(model, inputs, inputs["input_features"].to(embeds.dtype))
    if int(here.sum()) != len(audio):
        raise RuntimeError(f"{len(audio)} audio embeddings for {int(here.sum())} places in the prompts")
    return embeds.masked_scatter(here[..., None], audio.to(embeds.dtype))


def end_tokens(model, processor, flag):
    """The ids that end an answer: what the chat template puts behind one, what the checkpoint's generation_config lists
    and what the tokenizer calls its end, in this order. Where the list lacks one of the others, a line says so.

    Any of them ends a sample: listed with another end than it was taught, a model would never stop. Raises DataError
    where there is none.
    """
    tokenizer, listed = processor.tokenizer, model.generation_config.eos_token_id
    listed = listed if isinstance(listed, list) else [listed] * (listed is not None)
    template = behind_an_answer(processor)
    found = list(dict.fromkeys(i for i in (template, *listed, tokenizer.eos_token_id) if i is not None))
    if not found or not 0 <= min(found) <= max(found) < model.get_input_embeddings().num_embeddings:
        raise DataError(f"{flag}: by its generation_config, chat template and tokenizer an answer ends with token "
                        f"{found or 'none'}; the model has {model.get_input_embeddings().num_embeddings} tokens")
    if lacking := set(found) - set(listed):
        print(f"{flag}: an answer ends with {listed or 'nothing'} by its generation_config, with {sorted(lacking)} by "
              "its chat template or tokenizer; either ends one here")
    return found


def behind_an_answer(processor):
    """The special token that a chat template puts right behind what the assistant says; None where it puts none."""
    tokenizer = processor.tokenizer
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}, {"role": "assistant", "content": "zq"}],
                                             tokenize=False)
        rest = tokenizer(text[text.rindex("zq") + 2:], add_special_tokens=False).input_ids
    except Exception:  # noqa: BLE001      templates are programs of others: no template, another form of content, ...
        return None
    return rest[0] if rest and rest[0] in tokenizer.all_special_ids else None


def answers(processor, rows):
    """Token ids, prompt excluded -> the transcripts."""
    texts = processor.batch_decode(rows, skip_special_tokens=True)
    return [re.sub(f"^{recogniser(processor).before}", "", text.strip()).strip() for text in texts]


def settle(model):
    """Puts right what would go wrong later, and returns the model.

    Granite brings LoRA of its own, which is on whenever there is audio: it is merged into the weights, so that the
    reference (our adapters off) keeps it. And its class of transformers 5.23 forgets to divide the logits by the
    LLM's `logits_scaling` (8 in granite-speech-3.3), as GraniteForCausalLM does: the same greedy text, but samples
    and log-probs at an eighth of the temperature.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        for name, layer in list(model.named_modules()):
            if isinstance(layer, BaseTunerLayer):
                layer.merge()
                model.set_submodule(name, layer.get_base_layer())
        model._hf_peft_config_loaded = model.config.has_lora_adapter = False
        del model.peft_config
        model._weight_conversions = None        # those of the adapter: its names would go into what is saved
    scaling = getattr(model.config.get_text_config(decoder=True), "logits_scaling", 1)
    if scaling != 1:
        model.lm_head.register_forward_hook(lambda module, given, logits: logits / scaling)
    return model
