"""The frozen models behind the rewards and the evaluation of speech.

    Codec      speech tokens <-> waveform                   `Xcodec2Model`, `NeuCodecModel`
    Judge      waveform -> text                             a recogniser
    Speaker    waveform -> whose voice                      `WavLMForXVector` or its like
    Token2Text speech tokens -> log P(text)                 the reward model of DiffRO
Each loads a folder or a hub id, works in inference mode and in batches, and can live in main memory between its turns
on the GPU (`offload`): the paper's rotation, on one card.
"""
import contextlib
import itertools

import numpy as np
import torch
from torchaudio.functional import resample
from transformers import (
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioXVector,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)

from engine.audio import DataError, reason
from engine.models import load_pretrained, load_recogniser, precision
from engine.recognisers import answers, ask, embed, rate, recogniser
from engine.sampling import Prompts, forget, sample
from engine.text import language_code


class Frozen:
    """A model that only judges: in inference mode, and with `offload` on the GPU only while it works."""

    def __init__(self, model, device, offload=False):
        self.device, self.home = device, torch.device("cpu") if offload else device
        self.model = model.eval().requires_grad_(False).to(self.home)

    @contextlib.contextmanager
    def at_work(self):
        self.model.to(self.device)
        with torch.inference_mode():
            yield self.model
        if self.home != self.device:
            forget(self.model)               # a captured step reads the places that the weights leave now
        self.model.to(self.home)


class Codec(Frozen):
    """Speech tokens <-> waveform at `rate` Hz, `tokens_per_s` of them: an `Xcodec2Model`, or a `NeuCodecModel`, which
    hears at 16 kHz and speaks at 24: its speech comes resampled to what the judges hear."""

    def __init__(self, name, device, offload=False):
        self.extractor = load_pretrained(AutoFeatureExtractor, name, flag="--codec")
        model = load_pretrained(AutoModel, name, flag="--codec", dtype=torch.float32)
        if not hasattr(model, "acoustic_decoder"):
            raise DataError(f"--codec {name}: is a {type(model).__name__}, not an Xcodec2Model or NeuCodecModel")
        self.rate = self.extractor.sampling_rate
        self.spoken_rate = getattr(model.config, "output_sampling_rate", self.rate)
        self.hop = model.config.hop_length * self.rate // self.spoken_rate              # samples a token, at `rate`
        self.tokens_per_s, self.count = self.rate / self.hop, int(np.prod(model.config.quantization_levels))
        super().__init__(model, torch.device("cpu"))
        self.decoder_device, self.offload = device, offload

    def encode(self, waves):
        """float32 waveforms (samples,) -> their code arrays (T,), one by one: padding would reach into the codes."""
        with self.at_work() as model:
            inputs = [self.extractor(w, sampling_rate=self.rate, return_tensors="pt") for w in waves]
            return [model.encode(**i).audio_codes[0, 0].numpy() for i in inputs]

    def decoder_only(self):
        """Drops the encoder, half of the model, and moves the rest to its place; call it when all is encoded."""
        for part in ("semantic_encoder", "semantic_adapter", "acoustic_encoder", "fc_encoder"):
            setattr(self.model, part, None)
        super().__init__(self.model, self.decoder_device, self.offload)
        return self

    def decode(self, codes, most=16_000):
        """Code arrays -> float32 waveforms, at most `most` tokens at a time; no tokens give no samples.

        The decoder normalises over time and attends to all of it, without positions: padding with one code changes
        the whole row (12 dB of error on the embedded codec), padding with the row itself nearly nothing (31 dB).
        """
        waves = [np.zeros(0, dtype=np.float32)] * len(codes)
        order = sorted((i for i in range(len(codes)) if len(codes[i])), key=lambda i: len(codes[i]))
        with self.at_work() as model:
            while order:
                longest = len(codes[order[-1]])
                part, order = order[-max(1, most // longest):], order[:-max(1, most // longest)]
                ids = torch.from_numpy(np.stack([np.resize(codes[i], longest) for i in part])).to(self.device)
                audio = resample(model.decode(ids[:, None]).audio_values[:, 0].float(), self.spoken_rate, self.rate)
                for i, wave in zip(part, audio.cpu().numpy()):
                    waves[i] = wave[:len(codes[i]) * self.hop]
        return waves


class Judge(Frozen):
    """A recogniser that reads waveforms greedily: any class in recognisers.py."""

    def __init__(self, name, device, offload=False, language="en", flag="--judge"):
        self.processor, model = load_recogniser(name, flag, dtype=precision(device))
        self.rate, self.language = rate(self.processor), language
        super().__init__(model, device, offload)
        try:                                     # half a second of noise: what fails here would fail on every sample
            with self.at_work():
                self.hear([0.1 * np.random.default_rng(0).standard_normal(self.rate // 2).astype(np.float32)])
        except (ValueError, ImportError) as error:
            raise DataError(f"{flag} {name} with --language {language}: refuses to transcribe ({reason(error)})"
                            ) from None

    def transcribe(self, waves, batch=128):
        """Waveforms (samples,) at `rate` -> their texts. "" for less than 0.1 s; None where the judge failed."""
        texts = ["" if np.isfinite(w).all() else None for w in waves]
        order = sorted((i for i, w in enumerate(waves) if texts[i] == "" and len(w) >= 0.1 * self.rate),
                       key=lambda i: len(waves[i]))
        with self.at_work():
            for start in range(0, len(order), batch):
                part = order[start:start + batch]
                for i, text in zip(part, self.read([waves[i] for i in part])):
                    texts[i] = text
        return texts

    def read(self, waves):
        """The texts of one batch; when it fails, of its halves, so that one bad sample costs only itself."""
        try:
            return self.hear(waves)
        except torch.cuda.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError):
            if len(waves) == 1:
                return [None]
            half = len(waves) // 2
            return self.read(waves[:half]) + self.read(waves[half:])

    def hear(self, waves):
        """The texts of one batch, at most 16 tokens and 8 a second of its own sound for each."""
        inputs = ask(self.processor, waves, self.language).to(self.device)
        limits = [16 + int(8 * len(w) / self.rate) for w in waves]
        return answers(self.processor, [row[:limit] for row, limit in zip(self.likeliest(inputs, max(limits)), limits)])

    def likeliest(self, inputs, limit):
        """The likeliest answers to a batch, at most `limit` tokens, as lists of ids: by the policy's own sampler, where
        the class has an LLM that reads a prompt."""
        model = self.model
        if recogniser(model).hear:
            prompts = Prompts(embed(model, inputs), inputs["attention_mask"])
            rollout = sample(model, prompts, 1, limit, model.generation_config.eos_token_id, temperature=0)
            return [row[keep].tolist() for row, keep in zip(rollout.ids.cpu(), rollout.mask.cpu())]
        asked = (dict(language=language_code(self.language), task="transcribe")
                 if model.generation_config.is_multilingual else {})
        return model.generate(input_features=inputs["input_features"].to(model.dtype), do_sample=False, num_beams=1,
                              attention_mask=inputs["attention_mask"], max_new_tokens=limit, **asked).tolist()


class Speaker(Frozen):
    """Whose voice it is: x-vectors of a `WavLMForXVector` or its like."""

    def __init__(self, name, device, offload=False):
        self.extractor = load_pretrained(AutoFeatureExtractor, name, flag="--speaker")
        super().__init__(load_pretrained(AutoModelForAudioXVector, name, flag="--speaker", dtype=torch.float32), device,
                         offload)
        self.rate, config = self.extractor.sampling_rate, self.model.config
        self.least = 2 + sum((k - 1) * d for k, d in zip(config.tdnn_kernel, config.tdnn_dilation))  # two frames left
        for kernel, stride in zip(config.conv_kernel[::-1], config.conv_stride[::-1]):
            self.least = (self.least - 1) * stride + kernel                                         # samples, 0.3 s

    def embed(self, waves, batch=64):
        """Waveforms (samples,) -> unit vectors (N, D); those of one length together, since these models normalise over
        time and padding would count. Zeros for less than `least` samples, whose cosine with any voice is 0."""
        found = torch.zeros(len(waves), self.model.config.xvector_output_dim)
        fit = [i for i, wave in enumerate(waves) if len(wave) >= self.least and np.isfinite(wave).all()]
        fit.sort(key=lambda i: len(waves[i]))
        with self.at_work() as model:
            for _, alike in itertools.groupby(fit, key=lambda i: len(waves[i])):
                alike = list(alike)
                for part in (alike[k:k + batch] for k in range(0, len(alike), batch)):
                    inputs = self.extractor([waves[i] for i in part], sampling_rate=self.rate, return_tensors="pt")
                    vectors = model(**inputs.to(self.device)).embeddings.float()
                    found[part] = torch.nn.functional.normalize(vectors, dim=-1).cpu()
        return found


class Token2Text(Frozen):
    """log P(text | speech tokens), the reward model of DiffRO: what `python -m pretrain token2text` makes."""

    def __init__(self, name, device, codes):
        self.tokenizer = load_pretrained(AutoTokenizer, name, flag="--token2text")
        model = load_pretrained(AutoModelForSeq2SeqLM, name, flag="--token2text", dtype=torch.float32)
        self.first = getattr(model.config, "first_speech_token", None)
        if self.first is None or self.first + codes > model.config.vocab_size:
            raise DataError(f"--token2text {name}: does not read the {codes} codes of the codec; python -m pretrain "
                            "token2text --tokens DIR trains one that does")
        super().__init__(model, device)

    def text_ids(self, texts):
        """Texts -> its own tokens (N, S), the end of text included, and their mask."""
        rows = [torch.tensor(self.tokenizer(t, add_special_tokens=False).input_ids + [self.tokenizer.eos_token_id])
                for t in texts]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        lengths = torch.tensor([len(row) for row in rows])
        return ids.to(self.device), (torch.arange(ids.shape[1]) < lengths[:, None]).to(self.device)

    def read(self, codes, most=150):
        """Code arrays -> texts, greedily: its own word on what was said. No codes give no text."""
        spoken = [i for i in range(len(codes)) if len(codes[i])]
        rows = [torch.from_numpy(np.asarray(codes[i])) + self.first for i in spoken]
        texts = [""] * len(codes)
        if rows:
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)
            with self.at_work() as model:
                out = model.generate(input_ids=ids.to(self.device), do_sample=False, num_beams=1, max_new_tokens=most,
                                     attention_mask=(ids != self.tokenizer.pad_token_id).long().to(self.device))
            for i, text in zip(spoken, self.tokenizer.batch_decode(out, skip_special_tokens=True)):
                texts[i] = text.strip()
        return texts
