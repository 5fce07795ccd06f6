"""What to do with a trained model: merge its adapter, transcribe files, speak a text.

    python -m tools.use merge RUN --out DIR                          one model for plain transformers
    python -m tools.use transcribe MODEL_OR_RUN FILE...              what is said in audio files, one line a file
    python -m tools.use speak MODEL_OR_RUN "text" --voice NAME --out FILE.wav

RUN is the folder of a run of grpo_asr.py, grpo_tts.py or diffro_tts.py: its log says which base model it trained, and
its adapter, the best one, is put on that; transcribe and speak do so without merging, in the precision of the run.
MODEL is a folder or hub id that the same scripts take as --model. merge puts the adapter of an 8-bit run on the base
that is not quantised; it adds in fp32 and saves in the precision that the base is stored in, unless --dtype says
otherwise.
"""
import argparse

from engine.settings import check_language


def parse_args(argv=None):
    """What to do, with which model."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True, metavar="merge|transcribe|speak")
    c = commands.add_parser("merge", help="base and adapter as one model")
    c.add_argument("model", metavar="RUN", help="the folder of a run")
    c.add_argument("--out", required=True, metavar="DIR", help="where to save it, a new folder")
    c.add_argument("--dtype", choices=["stored", "bfloat16", "float32"], default="stored",
                   help="of the weights that are saved; stored = as the base's (default: stored)")
    c = commands.add_parser("transcribe", help="what is said in audio files")
    c.add_argument("model", metavar="MODEL_OR_RUN")
    c.add_argument("files", nargs="+", metavar="FILE", help="any rate, mono or stereo; wav, flac, ogg, mp3")
    c.add_argument("--language", help="(default: the run's, else en)")
    c.add_argument("--max-seconds", type=float, help="longest file allowed; 0 = any (default: the run's, else 30)")
    c = commands.add_parser("speak", help="a text as a wav file")
    c.add_argument("model", metavar="MODEL_OR_RUN")
    c.add_argument("text")
    c.add_argument("--out", required=True, metavar="FILE", help="wav, flac or ogg")
    c.add_argument("--voice", metavar="NAME", help='one of --voices, by its "voice" or the name of its file '
                   "(default: the first)")
    c.add_argument("--voices", metavar="DIR", help="(default: the run's, else data/tts/voices)")
    c.add_argument("--codec", help="(default: the run's, else checkpoints/codec)")
    c.add_argument("--temperature", type=float, help="of sampling; 0 = greedy (default: the run's, else 1)")
    c.add_argument("--max-seconds", type=float, help="longest speech (default: the run's, else 6)")
    c.add_argument("--seed", type=int, default=1, help="(default: 1)")
    for name in ("merge", "transcribe", "speak"):
        commands.choices[name].add_argument("--base", metavar="MODEL", help="the base model of the run, if it is not "
                                            "where it was")
        if name != "merge":
            commands.choices[name].add_argument("--device", default="auto", help="auto = cuda where there is one")
    args = p.parse_args(argv)
    for name in ("temperature", "max_seconds", "seed"):
        if getattr(args, name, None) is not None and not 0 <= getattr(args, name) < 2 ** 31:
            p.error(f"--{name.replace('_', '-')} must be from 0 to 2^31 - 1, not {getattr(args, name)}")
    check_language(p, getattr(args, "language", None))
    return args


if __name__ == "__main__":
    parse_args()  # --help and typing errors answer at once, before torch loads

import sys
from pathlib import Path

import safetensors
import soundfile as sf
import torch
from transformers import AutoConfig

import grpo_asr
import grpo_tts
from data import Sentence, Utterance, load_folder
from engine import speech
from engine.audio import DataError, read_audio
from engine.judges import Codec
from engine.log import logged_arguments
from engine.models import load_pretrained
from engine.run import load_adapter, pick_device, quiet
from engine.sampling import generator_for, sample

# ---- runs and models ---------------------------------------------------------------------------------------


def run_arguments(folder):
    """The arguments of the run in `folder`, from the first line of its log; None where it is no run's folder."""
    folder = Path(folder)
    if not (folder / "log.jsonl").is_file():
        return None
    saved = logged_arguments(folder)
    if not (folder / "adapter" / "adapter_model.safetensors").is_file():
        raise DataError(f"{folder}: a run without an adapter: it ended before its first evaluation, or only its log "
                        "was kept")
    return saved


def settings(args, kind):
    """The settings of the script behind a model of `kind` ("asr" or "tts"): its defaults, then the run's, then what is
    given here; with `adapter`, the run's, or None for a model alone. Raises DataError for a run of the other kind."""
    saved = run_arguments(args.model)
    if saved is None and args.model.startswith("runs/") and not Path(args.model).is_dir():
        raise DataError(f"{args.model}: no such folder")
    if saved and ("codec" in saved) != (kind == "tts"):
        what, command = ("speech recognition", "transcribe") if kind == "tts" else ("TTS", "speak")
        raise DataError(f"{args.model}: is a run of {what}; python -m tools.use {command} takes it")
    given = {"asr": grpo_asr, "tts": grpo_tts}[kind].parse_args([])
    vars(given).update(saved or {"model": args.model})
    vars(given).update((name, value) for name, value in vars(args).items() if value is not None and name != "model")
    given.model, given.resume = saved and args.base or given.model, None
    given.adapter = Path(args.model) / "adapter" if saved else None
    return given


def open_model(given, kind, device):
    """The processor (ASR) or tokenizer (TTS), and the policy: the base, and on it the run's adapter, not merged."""
    try:
        processor, policy = {"asr": grpo_asr, "tts": speech}[kind].load(given, device)
    except DataError as error:                              # there is no --model here
        raise DataError(str(error).removeprefix("--model ")) from None
    if given.adapter:                                       # without: a new one, which does nothing
        try:
            load_adapter(policy, given.adapter)
        except DataError as error:
            raise DataError(f"{error}, or was not made for {given.model}: --base names another") from None
    return processor, policy


# ---- the three commands ------------------------------------------------------------------------------------

def merge(args):
    """Base and adapter as one model in OUT, and how to load it."""
    saved, out = run_arguments(args.model), Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"--out {out}: is there already and not empty")
    if saved is None:
        raise DataError(f"{args.model}: no run there (no log.jsonl)")
    kind = "tts" if "codec" in saved else "asr"
    given = settings(args, kind)
    given.quantize = "none"
    processor, policy = open_model(given, kind, torch.device("cpu"))
    stored = load_pretrained(AutoConfig, given.model, "--base").dtype
    dtype = (stored or torch.float32) if args.dtype == "stored" else getattr(torch, args.dtype)
    try:
        model = policy.merge_and_unload(safe_merge=True).to(dtype)
    except ValueError as error:                             # numbers that are none
        raise DataError(f"{args.model}: its adapter is broken ({error})") from None
    try:
        model.save_pretrained(out)
        processor.save_pretrained(out)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise DataError(f"--out {out}: cannot be saved ({error})") from None
    auto, name = ("AutoModelForCausalLM", "Tokenizer") if kind == "tts" else ("AutoModelForMultimodalLM", "Processor")
    print(f"{given.model} with {args.model}/adapter, in {str(dtype).removeprefix('torch.')}. To load it:\n"
          f"from transformers import {auto}, Auto{name}\n"
          f'{name.lower()} = Auto{name}.from_pretrained("{out}")\nmodel = {auto}.from_pretrained("{out}")')


def transcribe(args):
    """Prints the greedy transcript of every file, with its name where there are several."""
    device = pick_device(args.device)
    given = settings(args, "asr")
    clips = [Utterance(Path(file), "", seconds=len(read_audio(Path(file), 16_000)) / 16_000) for file in args.files]
    for clip in clips:                                      # a bad file is named before the model loads
        if given.max_seconds and clip.seconds > given.max_seconds:
            raise DataError(f"{clip.path}: {clip.seconds:.7g} s long, over --max-seconds {given.max_seconds:g}")
    processor, policy = open_model(given, "asr", device)
    texts, _ = grpo_asr.evaluate(policy, processor, clips, given)
    for file, text in zip(args.files, texts):
        print(f"{file}: {text}" if len(texts) > 1 else text)


def speak(args):
    """Writes `text` as speech to OUT: one sample of the LLM, decoded by the codec."""
    device, out = pick_device(args.device), Path(args.out)
    if not any(c.isalnum() for c in args.text):
        raise DataError("the text has no word in it that could be said")
    if out.suffix[1:].upper() not in ("WAV", "FLAC", "OGG"):
        raise DataError(f"--out {out}: give a name that ends in .wav, .flac or .ogg")
    given = settings(args, "tts")
    codec = Codec(given.codec, device)
    clips = load_folder(given.voices, codec.rate, 0)
    names = [clip.voice or clip.path.stem for clip in clips]
    if args.voice not in (None, *names):
        raise DataError(f"--voice {args.voice}: {given.voices} has {', '.join(names)}")
    clip = clips[names.index(args.voice) if args.voice else 0]
    tokenizer, policy = open_model(given, "tts", device)
    [codes] = codec.encode([clip.waveform(codec.rate)])
    voice = speech.Voice(args.voice, clip.text, codes.tolist(), None)
    code = speech.speech_tokens(tokenizer, codec, policy.config.vocab_size)
    text, limit = " ".join(args.text.split()), int(given.max_seconds * codec.tokens_per_s)
    speech.check_lengths(policy, tokenizer, [Sentence(text)], [voice], limit, codec)
    rollout = sample(policy, speech.make_prompts(policy, tokenizer, [text], [voice]), 1, limit,
                     tokenizer.convert_tokens_to_ids(speech.END), given.temperature,
                     generator_for(args.seed, 0, device))
    if rollout.truncated.any():
        raise DataError(f"the speech did not end within --max-seconds {given.max_seconds:g}; raise it, shorten the "
                        f"text, or try another --seed than {args.seed}")
    [wave] = codec.decoder_only().decode(speech.codes_of(rollout, code))
    if not len(wave):
        raise DataError(f"the model said nothing; try another --seed than {args.seed}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        sf.write(out, wave, codec.rate)
    except (OSError, sf.LibsndfileError) as error:
        raise DataError(f"--out {out}: cannot be written ({error})") from None
    print(f"{len(wave) / codec.rate:.2f} s in {out}")


def main(argv=None):
    args = parse_args(argv)
    quiet()
    try:
        {"merge": merge, "transcribe": transcribe, "speak": speak}[args.command](args)
    except DataError as error:
        sys.exit(f"error: {error}")
    except torch.cuda.OutOfMemoryError:
        sys.exit("error: the GPU's memory is full; --device cpu, or a run with --quantize")
    except KeyboardInterrupt:
        sys.exit("stopped")


if __name__ == "__main__":
    main()
