"""The codec: waveform <-> speech tokens, 50 a second, of 12 bits.

The stage, called by `python -m pretrain codec`: an `Xcodec2Model` whose semantic branch reads filter banks, 7M
parameters, in checkpoints/codec. Everything here is our choice; the class is that of the published checkpoint.
"""
import copy
import functools
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torchaudio
from transformers import Xcodec2Config, Xcodec2FeatureExtractor, Xcodec2Model

from engine.run import pick_device
from pretrain import corpus, parts
from pretrain.graph import graphed
from pretrain.parts import HELD, pace

CHECKPOINTS = Path("checkpoints")
RATE = corpus.SAMPLE_RATE


def build_codec(levels, seed=1):
    """A small `Xcodec2Model` with 50 tokens a second, and its feature extractor.

    Both branches of its encoder are trained along here. The semantic one reads mel features that are normalised over
    the clip, so that whose voice it is reaches the quantiser through the acoustic one alone, from the waveform. Left
    as the class initialises it, that one's output is 3e-5: it starts with torch's own initialisation instead.
    """
    torch.manual_seed(seed)
    semantic = dict(model_type="wav2vec2-bert", hidden_size=192, num_hidden_layers=2, num_attention_heads=4,
                    intermediate_size=768, feature_projection_input_dim=160, conv_depthwise_kernel_size=15,
                    layerdrop=0.0, mask_time_prob=0.0, mask_feature_prob=0.0, hidden_dropout=0.0, attention_dropout=0.0,
                    activation_dropout=0.0, feat_proj_dropout=0.0, conformer_conv_dropout=0.0, apply_spec_augment=False)
    config = Xcodec2Config(
        encoder_hidden_size=4, downsampling_ratios=[2, 2, 4, 4, 5], semantic_model_config=semantic,
        quantization_levels=levels, quantization_dim=192 + 256, hidden_size=256, intermediate_size=768,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, head_dim=64, activation_dropout=0.0,
        initializer_range=0.04)
    codec = Xcodec2Model(config)
    for layer in codec.acoustic_encoder.modules():
        if isinstance(layer, torch.nn.Conv1d):
            layer.reset_parameters()
    return codec, Xcodec2FeatureExtractor(hop_length=config.hop_length)


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
    return encode_cuts(codec, waves, codec_features(waves, codec.hop_length))[:2]


def encode_cuts(codec, waves, features, acoustic=None):
    """`quantise` with the features (N, T, 160) at hand, and maybe what the acoustic branch gives (N, T, hidden); that
    comes back too, and what enters the quantiser (N, T, levels)."""
    semantic = codec.semantic_adapter(codec.semantic_encoder(features).last_hidden_state.transpose(1, 2))
    if acoustic is None:
        acoustic = codec.acoustic_encoder(waves[:, None]).transpose(1, 2)
    hidden = codec.fc_encoder(torch.cat([semantic.transpose(1, 2), acoustic], dim=2))
    latents, codes = codec.quantizer(hidden)
    return latents, codes[..., 0], acoustic, codec.quantizer.project_in(hidden)


def unit_variance(layer, run):
    """Scales a linear or convolutional layer so that each of its outputs has mean 0 and variance 1 when `run()`."""
    seen = []
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(output.float()))
    with torch.no_grad():
        run()
        hook.remove()
        over = (seen[0].transpose(1, 2) if isinstance(layer, torch.nn.Conv1d) else seen[0]).flatten(0, 1)
        mean, std = over.mean(0), over.std(0)
        layer.bias.copy_((layer.bias - mean) / std)
        layer.weight /= std.view(-1, *[1] * (layer.weight.ndim - 1))


def mel_loss(audio, target, transforms):
    """Mean distance of log-mel spectrograms over several window lengths; (N, samples) both."""
    return sum((torch.log(t(audio).clamp(min=1e-4)) - torch.log(t(target).clamp(min=1e-4))).abs().mean()
               for t in transforms) / len(transforms)


def codec_corpus(device, hop, seed):
    """The recordings of build/speech for the codec, half of them faster or slower with their pitch, as more
    voices: samples (all tokens, hop) in int16, the extractor's features (all tokens, 160), and where each recording
    starts and how many tokens it has.
    """
    data, rng = parts.all_speech(), np.random.default_rng(seed)
    waves = list(data["samples"].split(data["lengths"].tolist()))[:-HELD]
    some = rng.permutation(len(waves))[:len(waves) // 2]
    for part in np.array_split(some, 1 + len(some) // 500):
        rate = int(100 * rng.uniform(0.8, 1.25))
        flat = torchaudio.functional.resample(torch.cat([waves[i] for i in part]).to(device).float(), 100, rate)
        sizes = torch.tensor([len(waves[i]) for i in part]) * rate // 100
        for i, wave in zip(part, flat[:sizes.sum()].clamp(-32768, 32767).to(torch.int16).cpu().split(sizes.tolist())):
            waves[i] = wave
    tokens = torch.tensor([-(-len(wave) // hop) for wave in waves])
    starts = torch.cumsum(tokens, 0) - tokens
    samples = torch.zeros(int(tokens.sum()), hop, dtype=torch.int16, device=device)
    features = torch.zeros(int(tokens.sum()), 160, dtype=torch.float16, device=device)
    for count in tokens.unique().tolist():                              # those of one length together, unpadded
        for part in (tokens == count).nonzero()[:, 0].split(max(1, 2 ** 15 // count)):
            block = torch.stack([torch.nn.functional.pad(waves[i], (0, count * hop - len(waves[i]))) for i in part])
            at = (starts[part, None] + torch.arange(count)).to(device)
            block = block.to(device)
            samples[at] = block.view(len(part), count, hop)
            features[at] = codec_features(block.float() / 32768, hop)[:, :count].to(torch.float16)
    return samples, features, starts, tokens


class Discriminator(torch.nn.Module):
    """Tells recordings from what the codec makes of them, by spectrograms of three resolutions [as in DAC, Vocos]."""

    def __init__(self, windows=(2048, 1024, 512), width=32):
        super().__init__()
        conv = lambda i, o, **given: torch.nn.utils.parametrizations.weight_norm(  # noqa: E731
            torch.nn.Conv2d(i, o, (3, 9), padding=(1, 4), **given))
        self.windows = windows
        self.parts = torch.nn.ModuleList(torch.nn.ModuleList([
            conv(2, width), conv(width, width, stride=(1, 2)), conv(width, width, stride=(1, 2)),
            conv(width, width, stride=(1, 2)), conv(width, 1)]) for _ in windows)

    def forward(self, waves):
        """(N, samples) -> scores, a map for each resolution, and the maps of all layers before."""
        scores, maps = [], []
        for size, layers in zip(self.windows, self.parts):
            spectrum = torch.stft(waves, size, size // 4, window=torch.hann_window(size, device=waves.device),
                                  return_complex=True)
            x = torch.view_as_real(spectrum).permute(0, 3, 2, 1)                     # (N, 2, frames, bins)
            with torch.autocast(waves.device.type, torch.bfloat16, enabled=waves.is_cuda):
                for layer in layers[:-1]:
                    x = torch.nn.functional.leaky_relu(layer(x), 0.1)
                    maps.append(x)
                scores.append(layers[-1](x).float())
        return scores, maps

    def doubt(self, audio, waves):
        """Its own loss: recordings above 1, what the codec makes of them below -1."""
        return sum(torch.relu(1 - real).mean() + torch.relu(1 + fake).mean()
                   for real, fake in zip(self(waves)[0], self(audio.detach())[0])) / len(self.windows)

    def verdict(self, audio, waves):
        """The codec's loss: how unlike the maps are, and how few it takes for recordings."""
        (scores, maps), aims = self(audio), self(waves)[1]
        unlike = sum((one - aim.detach()).abs().mean() / aim.detach().abs().mean() for one, aim in zip(maps, aims))
        return 0.5 * unlike / len(maps) - 0.1 * sum(score.mean() for score in scores) / len(scores)


def train_codec(args, levels=(4, 4, 4, 4, 4, 4), cut_tokens=96, judged_tokens=32):
    """Trains the codec on random cuts of the recordings, on the distance of mel spectrograms, in two parts.

    First all of it, with a head on the acoustic branch, for training alone, that asks for the log-mel spectrum as it
    is: no other loss made it carry that within minutes. It is most of the time of a step, so in the second part it
    stays as it is and gives its outputs once. In the last third of that a discriminator has a word too: voices that
    were never heard gain by it. To go on is to train what makes sound of tokens alone: the tokens stay what they are.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    device, started = pick_device(args.device), time.time()
    codec, extractor = build_codec(list(levels))
    if args.go_on:
        codec = load_codec("cpu")
        for part in (codec.semantic_encoder, codec.semantic_adapter, codec.fc_encoder, codec.quantizer.project_in):
            part.requires_grad_(False)
    codec.to(device).train()
    hop, width = codec.hop_length, codec.config.hidden_size
    samples, features, starts, tokens = codec_corpus(device, hop, args.seed)
    usable = (tokens >= cut_tokens).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(args.seed)
    transforms = [torchaudio.transforms.MelSpectrogram(RATE, n, hop_length=n // 4, n_mels=m, power=1).to(device)
                  for n, m in ((2048, 128), (1024, 80), (512, 80), (256, 40))]
    print(f"codec: {len(usable)} recordings, {len(samples) * hop / RATE / 3600:.1f} h, {time.time() - started:.0f} s",
          flush=True)

    def cut():
        """Random cuts: samples (N, T * hop), features (N, T, 160) and, in the second part, acoustic outputs."""
        batch = args.codec_batch * (1 + len(outputs))
        rows = usable[torch.randint(len(usable), (batch,), generator=generator)]
        first = starts[rows] + (torch.rand(batch, generator=generator) * (tokens[rows] - cut_tokens + 1)).long()
        at = first.to(device)[:, None] + torch.arange(cut_tokens, device=device)
        return [samples[at].flatten(1).float() / 32768, features[at].float(), *[table[at].float() for table in outputs]]

    outputs = []
    spectrum = torch.nn.Linear(width, 2 * 80).to(device)
    spectra = torchaudio.transforms.MelSpectrogram(RATE, 400, hop_length=hop // 2, n_mels=80, power=1).to(device)
    if not args.go_on:
        unit_variance(codec.acoustic_encoder.conv2, lambda: encode_cuts(codec, *cut()))
        unit_variance(codec.quantizer.project_in, lambda: encode_cuts(codec, *cut()))
    weights, judge, lr = [*codec.parameters(), *spectrum.parameters()], Discriminator().to(device), args.codec_lr
    given = dict(betas=(0.8, 0.99), fused=device.type == "cuda", capturable=device.type == "cuda")
    optimizer = torch.optim.AdamW(weights, lr=torch.tensor(lr, device=device), weight_decay=0.01, **given)
    against = torch.optim.AdamW(judge.parameters(), lr=torch.tensor(3e-4, device=device), **given)

    def train(waves, heard, acoustic=None, judged=False):
        """One step: log-mel distances of the speech and of the head on the acoustic branch, codes (N, T)."""
        latents, codes, branch, entering = encode_cuts(codec, waves, heard, acoustic)
        audio = codec.acoustic_decoder(latents)[:, 0]
        mel = mel_loss(audio, waves, transforms)
        target = torch.log(spectra(waves)[..., :2 * cut_tokens].clamp(min=1e-4)).transpose(1, 2).reshape(
            len(waves), cut_tokens, 160)
        apart = (spectrum(branch) - target).abs().mean()
        spread = entering.mean((0, 1)).square().mean() + (entering.std((0, 1)) - 1).square().mean()
        loss = mel + 0.2 * apart + 0.1 * spread                       # spread: all levels stay in use
        if judged:
            against.zero_grad(set_to_none=True)
            part = slice(judged_tokens * hop)                         # a stretch of each: it is slow
            judge.doubt(audio[:, part], waves[:, part]).backward()
            against.step()
            loss = loss + judge.verdict(audio[:, part], waves[:, part])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        return mel.detach(), apart.detach(), codes

    used, part = set(), None
    for step, done in pace(args, args.codec_steps):
        so_far = done * (step - 1) / step
        if part != (part := (so_far >= args.codec_joint or args.go_on, so_far >= args.codec_judged)):
            if part[0] and not outputs:
                outputs.append(acoustic_outputs(codec, samples, starts, tokens))
            one_step = graphed(functools.partial(train, judged=part[1]), cut())
        optimizer.param_groups[0]["lr"].fill_(lr * min(1, step / 500) * (
            0.5 + 0.5 * math.cos(math.pi * max(0, so_far - 0.4) / 0.6)))
        mel, apart, codes = one_step(*cut())
        if not 10 < step % 200:
            used |= set(codes.flatten().tolist())
        if step % 200 == 10:
            print(f"codec step {step} mel {mel:.4f} acoustic {apart:.4f} codes {len(used)} "
                  f"{time.time() - started:.0f} s", flush=True)
            used = set()
        if step % 5000 == 0 or done == 1:
            copy.deepcopy(codec).eval().to(torch.bfloat16).cpu().save_pretrained(CHECKPOINTS / "codec")
            extractor.save_pretrained(CHECKPOINTS / "codec")
    print(f"codec: {sum(p.numel() for p in codec.parameters()) / 1e6:.2f}M parameters, {step} steps, "
          f"{time.time() - started:.0f} s")
    for kind in ["decoded"] if args.go_on else ["decoded", "tokens"]:     # of another codec
        shutil.rmtree(parts.BUILD / kind, ignore_errors=True)


@torch.no_grad()
def acoustic_outputs(codec, samples, starts, tokens, most=2 ** 14):
    """What the acoustic branch, fixed from here on, gives for every token: float16 (all tokens, hidden)."""
    found = torch.zeros(len(samples), codec.config.hidden_size, dtype=torch.float16, device=samples.device)
    codec.acoustic_encoder.requires_grad_(False)
    for count in tokens.unique().tolist():
        for part in (tokens == count).nonzero()[:, 0].split(max(1, most // count)):
            at = (starts[part, None] + torch.arange(count)).to(samples.device)
            waves = samples[at].flatten(1).float() / 32768
            found[at] = codec.acoustic_encoder(waves[:, None]).transpose(1, 2).to(torch.float16)
    return found


def load_codec(device):
    """The saved codec, in fp32 on `device`."""
    return Xcodec2Model.from_pretrained(CHECKPOINTS / "codec", dtype=torch.float32).eval().to(device)


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
