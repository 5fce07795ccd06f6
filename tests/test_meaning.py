"""Well-formed input that means something else than it is taken for: each kind with the input that showed it."""
import ast
import json
import shutil
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import ROOT, first, load_policy
from transformers import Phi3Config, Phi3ForCausalLM
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

import data
import grpo_asr
import grpo_tts
import rewards
from data import Sentence, load_folder, load_sentences, split_clips, split_texts, with_lists
from engine import audio, speech
from engine.audio import DataError, read_audio
from engine.log import RunLog
from engine.models import add_adapters, load_recogniser
from engine.recognisers import ask, behind_an_answer, collate
from engine.text import language_code, normalize_text
from rewards import asr_accuracy, asr_reward, edit_counts, hallucination, keyword_counts
from tools import prepare, use

RATE = 16_000


def noise(seconds=1.0, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(int(seconds * RATE))).astype(np.float32)


def folder_of(path, *rows, seconds=1.0):
    """A data folder of (file name, text, seed of its noise, other keys); files are written once."""
    path.mkdir(parents=True, exist_ok=True)
    for name, _, seed, _ in rows:
        if not (path / name).exists():
            sf.write(path / name, noise(seconds, seed), RATE)
    (path / "metadata.jsonl").write_text("".join(
        json.dumps({"file_name": name, "text": text, **more}) + "\n" for name, text, _, more in rows))
    return path


def many(path, count, text="{} birds sang in the tree", seed=0):
    return folder_of(path, *((f"{i}.wav", text.format(i), seed + i, {}) for i in range(count)))


def clips_args(*flags, batch=2):
    return grpo_asr.parse_args(["--batch", str(batch), *map(str, flags)])


# ---- mine or yours, by place -----------------------------------------------------------------------------------

def test_a_users_folder_under_data_is_his_own(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "EMBEDDED", tmp_path)                     # as if tmp_path were the repository's data/
    train, dev, tests = split_clips(clips_args("--data", many(tmp_path / "mine", 20)), RATE)
    assert len(tests["held-out"]) == 2 and len(dev) == 1 and len(train) == 17
    (tmp_path / "texts.txt").write_text("\n".join(f"{i} birds sang" for i in range(20)))
    texts, dev, tests = split_texts(grpo_tts.parse_args(["--data", str(tmp_path / "texts.txt")]))
    assert len(tests["held-out"]) == 2 and len(dev) == 1 and len(texts) == 17


def test_an_embedded_pool_is_known_by_any_spelling_of_its_path(tmp_path, monkeypatch):
    assert data.are_ours(["data/d0/", "./data/../data/d3", str(ROOT / "data/d1"), "data/tts/train.jsonl"])
    assert not data.are_ours(["data/test/short"]) and not data.are_ours(["data/d0", "data"])
    (tmp_path / "data").symlink_to(ROOT / "data")           # which lies on another disk
    monkeypatch.setattr(data, "EMBEDDED", tmp_path / "data")
    assert data.are_ours([str(tmp_path / "data/d0"), "data/d3"]) and not data.are_ours([str(tmp_path / "data/dev")])


def test_the_embedded_models_are_found_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = grpo_tts.parse_args([])
    assert args.model == str(ROOT / "checkpoints/tts") and args.data == [str(ROOT / "data/tts/train.jsonl")]
    assert load_sentences(args.data[0]) and data.are_ours(args.data)
    with pytest.raises(DataError, match=f"no such folder in {tmp_path}"):
        load_folder("data/d0")
    with pytest.raises(DataError, match=f"no such folder.* in {tmp_path}"):
        load_recogniser("checkpoints/asr")


# ---- two lists of names ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, code", [
    ("中文", "zh"), ("mandarin", "zh"), ("zho", "zh"), ("chi", "zh"), ("cmn", "zh"), ("zh-CN", "zh"), ("zh_Hans", "zh"),
    ("Chinese", "zh"), ("jpn", "ja"), ("日文", "ja"), ("tha", "th"), ("Burmese", "my"), ("英文", "en"), ("EN", "en"),
    ("Cantonese", "yue"), ("Filipino", "fil"), ("deu", "de"), ("ger", "de"), ("Haitian Creole", "ht")])
def test_a_language_has_one_code_under_all_its_names(name, code):
    assert language_code(name) == code
    assert rewards.by_character(name) == (code in ("zh", "ja", "th", "my", "yue"))


def test_every_name_that_a_processor_takes_is_known(recogniser):
    from transformers.models.fun_asr_nano import processing_fun_asr_nano
    from transformers.models.qwen3_asr import processing_qwen3_asr
    for table in (processing_fun_asr_nano.LANGUAGE_CODE_TO_NAME, processing_qwen3_asr.LANGUAGE_CODE_TO_NAME):
        assert all(language_code(name) == language_code(code) for code, name in table.items())
    assert all(language_code(name) == code for name, code in TO_LANGUAGE_CODE.items())
    wave = noise()
    by_name, by_code = (ask(recogniser[1], [wave], name)["input_ids"].tolist() for name in ("mandarin", "zh"))
    assert by_name == by_code != ask(recogniser[1], [wave], "en")["input_ids"].tolist()


def test_an_unknown_language_is_an_error_and_not_counted_in_words(capsys):
    assert edit_counts("今天天气", "今天气", "中文") == (0, 1, 0, 4)
    with pytest.raises(ValueError, match="no language"):
        normalize_text("a", "simlish")
    with pytest.raises(SystemExit):
        grpo_asr.parse_args(["--language", "simlish"])
    for main, argv in ((prepare.main, ["select", "keywords", "data/d3", "--out", "x"]),
                       (use.main, ["transcribe", "checkpoints/asr", "a.wav"])):
        with pytest.raises(SystemExit):
            main([*argv, "--language", "simlish"])
    assert capsys.readouterr().err.count("--language: 'simlish' is no language") == 3


def test_keyword_lists_are_matched_in_the_language_of_the_data():
    clip = data.Utterance(ROOT / "a.wav", "我去北京看朋友", ("朋友",))
    [listed] = with_lists([clip], ["北京", "上海", "朋友"], 2, SimpleNamespace(seed=1, language="zh"))
    assert set(listed.listed) == {"朋友", "上海"}                        # 北京 is said: no distractor


# ---- the most permissive reader --------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["texts.json", "texts.csv", "texts.tsv", "texts", "texts.md", "texts.srt"])
def test_texts_of_an_unknown_suffix_are_not_read_as_plain_text(tmp_path, name):
    (tmp_path / name).write_text('["one", "two"]\n')
    with pytest.raises(DataError, match=r"read from .txt, one a line, or .jsonl, not"):
        load_sentences(tmp_path / name)


def test_a_suffix_counts_in_any_case(tmp_path):
    (tmp_path / "A.JSONL").write_text('{"text": "hello there", "voice": "bob"}\n')
    (tmp_path / "B.Txt").write_text("hello there\n")
    assert load_sentences(tmp_path / "A.JSONL") == [Sentence("hello there", "bob")]
    assert load_sentences(tmp_path / "B.Txt") == [Sentence("hello there")]


@pytest.mark.parametrize("line, what", [
    ('{"text": "hello"}', "JSON"), ('["hello"]', "JSON"), ("001\thello there", "row of a table"),
    ("LJ001-0001|Hello there|hello there", "row of a table"), ('"a1","hello there"', "row of a table"),
    ("a.wav,hello there", "row of a table"), ("text,voice", "row of a table"), ("17,hello there", "row of a table"),
    ("<speak>hello</speak>", "markup"), ("00:00:01,000 --> 00:00:04,000", "markup")])
def test_a_line_of_something_else_in_a_txt_is_named(tmp_path, line, what):
    (tmp_path / "a.txt").write_text(f"good morning\n{line}\n")
    with pytest.raises(DataError, match=rf"a.txt:2: .*{what}"):
        load_sentences(tmp_path / "a.txt")


def test_what_people_say_is_no_table(tmp_path):
    lines = ["1,000 people came, and 20 left", '"no," he said, "not now"', "well; perhaps", "[sighs] who knows",
             "is 3 < 4 or 5 > 4?", "{sic} he wrote", "the text, they say"]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    assert [s.text for s in load_sentences(tmp_path / "a.txt")] == lines


def test_a_folder_with_another_table_says_so(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,transcription\n")
    with pytest.raises(DataError, match="no metadata.jsonl, but metadata.csv"):
        load_folder(tmp_path)
    folder_of(tmp_path / "b", ("a.wav", "x", 0, {}))
    (tmp_path / "b/metadata.jsonl").write_text('{"file_name": "a.wav", "transcription": "hello"}\n')
    with pytest.raises(DataError, match='needs "text" as a string; it has file_name, transcription'):
        load_folder(tmp_path / "b")


# ---- tested and trained on -------------------------------------------------------------------------------------

@pytest.mark.parametrize("first, second", [("--dev", "--test"), ("--test", "--dev")])
def test_what_is_tested_or_chooses_is_left_out_by_path_by_sound_and_by_text(tmp_path, capsys, first, second):
    test, other = many(tmp_path / "test", 3), folder_of(tmp_path / "other", ("o.wav", "nothing like it", 99, {}))
    rows = [(f"{i}.wav", f"{i} cats slept", 50 + i, {}) for i in range(4)]
    mine = folder_of(tmp_path / "mine", *rows, ("copy.wav", "another text", 0, {}),            # the sound of 0.wav
                     ("voice.wav", "One birds, sang in the TREE!", 90, {}),                    # 1.wav's
                     (str(test / "2.wav"), "relabelled", 2, {}))
    train, *_ = split_clips(clips_args("--data", mine, first, test, second, other), RATE)
    assert [u.text for u in train] == [row[1] for row in rows]
    told = "3 lines of --data are in --dev or --test too: left out of the training (1 by sound, 1 by text, 1 by file)"
    assert told in capsys.readouterr().out


def test_a_clip_that_is_twice_there_is_not_trained_on_and_tested(tmp_path):
    once = many(tmp_path / "once", 20)
    for flags in (["--data", once, once], ["--data", once, many(tmp_path / "overlap", 12)]):
        train, dev, tests = split_clips(clips_args(*flags), RATE)
        for held in (dev, tests["held-out"]):
            assert held and not {u.text for u in held} & {u.text for u in train} and len(train) >= 16
            assert not {u.sound for u in held} & {u.sound for u in train}
        assert not {u.sound for u in dev} & {u.sound for u in tests["held-out"]}


def test_a_sentence_by_several_voices_is_on_one_side(tmp_path):
    mine = folder_of(tmp_path / "mine", *((f"{i}.wav", f"sentence number {i % 5}", i, {}) for i in range(40)))
    train, dev, tests = split_clips(clips_args("--data", mine), RATE)
    assert len(tests["held-out"]) == 4 and len({u.text for u in tests["held-out"]}) == 1 and len(train) == 24
    assert len({u.text for u in train} & {u.text for u in dev}) == 0
    same = folder_of(tmp_path / "same", *((f"{i}.wav", "always this", i, {}) for i in range(20)))
    with pytest.raises(DataError, match="0 of 17 lines of --data to train on.*the rest says the same"):
        split_clips(clips_args("--data", same), RATE)


def test_training_on_the_test_set_itself_is_refused(tmp_path):
    mine = many(tmp_path / "mine", 10)
    with pytest.raises(DataError, match="0 of 10 lines of --data to train on, fewer than --batch 2, and --test holds"):
        split_clips(clips_args("--data", mine, "--dev", mine, "--test", mine), RATE)


def test_clips_without_words_are_no_same_text(tmp_path):
    mine = folder_of(tmp_path / "mine", *((f"{i}.wav", "" if i % 2 else f"{i} dogs", i, {}) for i in range(40)))
    train, dev, tests = split_clips(clips_args("--data", mine), RATE)
    assert len(train) == 33 and len(dev) == 3 and len(tests["held-out"]) == 4


# ---- a finished run --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("left", ["summary.json", "state.pt", "step"])
def test_a_run_is_seen_by_any_of_its_files(tmp_path, left):
    log = RunLog(tmp_path / "run", {"arguments": {}})
    log.write("log", {"step": -1}) if left != "step" else log.write("log", {"step": 0})
    if left != "step":
        (tmp_path / "run" / left).write_text("{}")
    with pytest.raises(DataError, match="holds a run already"):
        RunLog(tmp_path / "run", {"arguments": {}})


@pytest.mark.parametrize("name", ["log.jsonl", "samples.jsonl", "metadata.jsonl", "samples/a.wav", "adapter/x"])
def test_a_folder_of_something_else_is_not_written_over(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine\n")
    with pytest.raises(DataError, match="holds something else"):
        RunLog(tmp_path, {"arguments": {}})
    assert (tmp_path / name).read_text() == "mine\n"


# ---- invariant work --------------------------------------------------------------------------------------------

def test_a_long_keyword_list_is_normalised_once(monkeypatch):
    keywords = frozenset(f"name{i} of{i}" for i in range(3000))
    calls, real = [], rewards.normalize_text
    monkeypatch.setattr(rewards, "normalize_text", lambda *given: calls.append(1) or real(*given))
    for i in range(5):
        asr_reward(f"i met name{i} of{i}", "i met", keywords)
    assert len(calls) < 3000 + 5 * 20
    assert keyword_counts("i met Name7 of7 and name8", "name7 of7", keywords) == (1, 1, 1)


def test_distractors_are_drawn_without_going_through_the_list(monkeypatch):
    calls, real = [], data.normalize_text
    monkeypatch.setattr(data, "normalize_text", lambda *given: calls.append(1) or real(*given))
    clips = [data.Utterance(ROOT / f"{i}.wav", f"i met name{i}", (f"name{i}",)) for i in range(50)]
    listed = with_lists(clips, {f"name{i}" for i in range(2000)}, 5, SimpleNamespace(seed=1, language="en"))
    assert len(calls) == 2050 and all(len(set(u.listed)) == 6 and u.keywords[0] in u.listed for u in listed)


# ---- headers ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rate", [44_101, 47_999, 11_027, 4_001, 399_989])
def test_no_rate_decides_the_memory(tmp_path, rate, monkeypatch):
    time = np.arange(rate) / rate
    sf.write(tmp_path / "a.wav", (0.3 * np.sin(2 * np.pi * 440 * time)).astype(np.float32), rate)
    asked, real = [], audio.torchaudio.functional.resample
    monkeypatch.setattr(audio.torchaudio.functional, "resample",
                        lambda wave, old, new: asked.append((old, new)) or real(wave, old, new))
    wave = read_audio(tmp_path / "a.wav", RATE)
    assert asked[0][0] * asked[0][1] <= 1e6 and asked[0][0] / asked[0][1] == pytest.approx(rate / RATE, rel=1e-3)
    assert abs(len(wave) - RATE) <= 20
    assert abs(np.abs(np.fft.rfft(wave[:8000])).argmax() * RATE / 8000 - 440) <= 2


def test_what_a_header_claims_is_looked_at_before_anything_is_read(tmp_path, monkeypatch):
    sf.write(tmp_path / "slow.wav", noise(), 100)
    with pytest.raises(DataError, match="a rate of 100 Hz"):
        read_audio(tmp_path / "slow.wav", RATE)
    with open(tmp_path / "sparse.wav", "wb") as file:                   # 4 GB that take no room
        sf.write(tmp_path / "head.wav", noise(), RATE)
        head = bytearray((tmp_path / "head.wav").read_bytes()[:44])
        head[4:8], head[40:44] = (2 ** 32 - 2).to_bytes(4, "little"), (2 ** 32 - 100).to_bytes(4, "little")
        file.write(head)
        file.truncate(2 ** 32 - 56)
    flac = tmp_path / "a.flac"
    sf.write(flac, noise(), RATE)
    head = bytearray(flac.read_bytes())
    head[21] |= 0x0F                                                    # total samples: 36 bits from byte 21 on
    head[22:26] = b"\xff" * 4
    flac.write_bytes(head)
    monkeypatch.setattr(sf, "read", None)
    for name in ("sparse.wav", "a.flac"):
        with pytest.raises(DataError, match="hours"):
            read_audio(tmp_path / name, RATE)


def test_decoded_audio_is_kept_up_to_a_number_of_bytes(monkeypatch):
    cache = audio.Cache()
    monkeypatch.setattr(cache, "limit", 10_000)
    for i in range(8):
        cache.keep(i, np.zeros(500, np.float32))
    assert list(cache) == [3, 4, 5, 6, 7] and cache.held == 10_000
    cache.keep("long", np.zeros(9_000, np.float32))                     # more than there is room for
    assert cache.held <= 10_000 and "long" not in cache


def test_a_file_that_is_gone_during_a_run_is_not_a_fault_of_the_language(recogniser, tmp_path):
    with pytest.raises(DataError, match="^" + str(tmp_path / "gone.wav") + ": no such file"):
        collate(recogniser[1], [data.Utterance(tmp_path / "gone.wav", "hello")], "en")


# ---- the end of an answer --------------------------------------------------------------------------------------

def ends_of(tmp_path, value, capsys):
    folder = shutil.copytree("checkpoints/asr", tmp_path / "asr")
    config = json.loads((folder / "generation_config.json").read_text())
    config.pop("eos_token_id")
    (folder / "generation_config.json").write_text(json.dumps(config | ({"eos_token_id": value} if value else {})))
    processor, model = load_recogniser(str(folder))
    names = processor.tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id)
    return names, capsys.readouterr().out


def test_the_templates_end_counts_where_the_generation_config_names_another(tmp_path, capsys):
    names, said = ends_of(tmp_path, 5, capsys)
    assert names[0] == "<|im_end|>" and len(names) == 2 and "an answer ends with [5] by its generation_config" in said


def test_an_end_is_found_where_the_generation_config_has_none(tmp_path, capsys):
    names, said = ends_of(tmp_path, None, capsys)
    assert names == ["<|im_end|>"] and "ends with nothing by its generation_config" in said


def test_an_end_that_the_model_has_not_is_named(tmp_path, capsys):
    with pytest.raises(DataError, match="an answer ends with token"):
        ends_of(tmp_path, 10 ** 6, capsys)


def test_no_word_where_the_two_sources_agree(recogniser, capsys):
    load_recogniser("checkpoints/asr")
    assert capsys.readouterr().out == ""
    assert behind_an_answer(recogniser[1]) == recogniser[1].tokenizer.eos_token_id


# ---- platforms -------------------------------------------------------------------------------------------------

def test_every_text_file_is_utf8_whatever_the_locale():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("engine/*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("pretrain/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(getattr(node, "func", None), "attr", getattr(getattr(node, "func", None), "id", ""))
            if isinstance(node, ast.Call) and name in ("open", "read_text", "write_text"):
                binary = any(isinstance(a, ast.Constant) and "b" in str(a.value) for a in node.args[1:])
                assert binary or any(k.arg == "encoding" for k in node.keywords), f"{path}:{node.lineno}"


def test_nothing_is_imported_that_one_platform_lacks(monkeypatch):
    import importlib
    import sys
    for name in ("fcntl", "resource"):
        monkeypatch.setitem(sys.modules, name, None)
    from engine import log, run
    try:
        importlib.reload(log), importlib.reload(run)
        assert run.Phases(torch.device("cpu")).memory_gib() == 0.0
    finally:
        monkeypatch.undo()
        importlib.reload(log), importlib.reload(run)


# ---- sound -----------------------------------------------------------------------------------------------------

def test_channels_that_cancel_each_other_out_are_not_silence(tmp_path):
    wave = noise()
    sf.write(tmp_path / "a.wav", np.stack([wave, -wave], 1), RATE, subtype="FLOAT")
    sf.write(tmp_path / "b.wav", np.stack([wave, -0.7 * wave], 1), RATE, subtype="FLOAT")
    sf.write(tmp_path / "c.wav", np.stack([wave, noise(seed=1)], 1), RATE, subtype="FLOAT")
    for name in "ab":
        np.testing.assert_allclose(read_audio(tmp_path / f"{name}.wav", RATE), wave, atol=1e-6)
    np.testing.assert_allclose(read_audio(tmp_path / "c.wav", RATE), (wave + noise(seed=1)) / 2, atol=1e-6)


def test_the_check_takes_clips_with_sound_and_words(recogniser, tmp_path, capsys):
    args, processor, policy = recogniser
    args = SimpleNamespace(**{**vars(args), "batch": 2, "group": 2, "micro": 4})
    sf.write(tmp_path / "silence.wav", np.zeros(RATE, np.float32), RATE)
    silent = data.Utterance(tmp_path / "silence.wav", "hello there", seconds=1.0)
    speech_, [wordless] = first(2, "data/test/short"), first(1, "data/test/noise")
    given, real = [], grpo_asr.collate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo_asr, "collate", lambda processor, clips, language: given.append(clips) or real(
            processor, clips, language))
        patch.setattr(grpo_asr, "self_check", lambda *given: None)
        grpo_asr.check(policy, processor, [silent, wordless, *speech_], args)
    assert given[0] == speech_


# ---- casing ----------------------------------------------------------------------------------------------------

def test_case_is_folded_by_the_language():
    assert normalize_text("İSTANBUL ILIK", "tr") == normalize_text("istanbul ılık", "tr")
    assert normalize_text("Işık", "Turkish") == "ışık" != normalize_text("işik", "tr")
    assert normalize_text("İstanbul", "en") == normalize_text("istanbul", "en")         # no dot is left over
    assert normalize_text("STRASSE", "de") == normalize_text("straße", "de")


# ---- adapters --------------------------------------------------------------------------------------------------

def test_fused_layers_get_adapters_too():
    base = Phi3ForCausalLM(Phi3Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                      num_attention_heads=2, num_key_value_heads=2, pad_token_id=0))
    policy = add_adapters(base, "", 4, 1)
    names = {name for name, module in policy.named_modules() if hasattr(module, "lora_A")}
    assert {name.rsplit(".", 1)[-1] for name in names} == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert len(names) == 8 and not any("lm_head" in name for name in names)


def test_layers_that_take_no_adapter_are_an_error():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts, self.o_proj = torch.nn.Parameter(torch.zeros(8, 16, 16)), torch.nn.Linear(16, 16)

        def get_output_embeddings(self):
            return None

        get_input_embeddings = get_output_embeddings

    with pytest.raises(DataError, match="only 11% of the weights of a Odd .*1 layers"):
        add_adapters(Odd(), "", 4, 1)


def test_only_the_llm_of_a_recogniser_is_adapted():
    names = [name for name, module in load_policy()[2].named_modules() if hasattr(module, "lora_A")]
    assert len(names) == 28 and all(".language_model.layers." in name for name in names)


# ---- members, names, numbers -----------------------------------------------------------------------------------

@pytest.mark.parametrize("more, message", [
    ({"keywords": ["anna", 2024]}, '"keywords" must be a list of strings'), ({"keywords": {}}, "list of strings"),
    ({"keywords": ""}, "list of strings"), ({"keywords": ["a\ud800"]}, "surrogate"), ({"voice": ["a"]}, '"voice"'),
    ({"voice": "\udc80"}, "surrogate"), ({"voice": True}, '"voice"')])
def test_a_wrong_member_of_a_list_is_named_with_its_line(tmp_path, more, message, capsys):
    folder_of(tmp_path / "a", ("a.wav", "one", 0, {}), ("b.wav", "two", 1, more))
    with pytest.raises(DataError, match=rf"metadata.jsonl:2: .*{message}"):
        load_folder(tmp_path / "a")
    with pytest.raises(SystemExit, match=rf"metadata.jsonl:2: .*{message}"):
        prepare.main(["select", "random", str(tmp_path / "a"), "--out", str(tmp_path / "b")])


def test_a_voice_that_is_a_number_is_a_name(tmp_path):
    [clip] = load_folder(folder_of(tmp_path, ("a.wav", "one", 0, {"voice": 0})))
    assert clip.voice == "0"


def test_another_name_for_the_same_judge_is_the_same_judge(tmp_path):
    (tmp_path / "link").symlink_to(ROOT / "checkpoints/asr")
    shutil.copytree("checkpoints/asr", tmp_path / "copy")
    for name in ("checkpoints/asr/", str(tmp_path / "link"), str(tmp_path / "copy")):
        with pytest.raises(DataError, match="--second-judge must not be --judge"):
            speech.load_judges(grpo_tts.parse_args(["--second-judge", name]), torch.device("cpu"))
    with pytest.raises(SystemExit, match="--second-model must not be --model"):
        prepare.main(["select", "disagreement", "data/d0", "--out", str(tmp_path / "d1"), "--model", "checkpoints/asr",
                      "--second-model", "checkpoints/asr/", "--device", "cpu"])


def test_an_unknown_voice_is_an_error_that_lists_the_voices():
    voices = [speech.Voice(name, "hi", [1], None) for name in ("kal16", "slt")]
    cast = speech.cast([Sentence("a"), Sentence("b", "slt"), Sentence("c")], voices)
    assert [s.voice.name for s in cast] == ["kal16", "slt", "kal16"]
    with pytest.raises(DataError, match='voice "Kal16" of "good day" is not in --voices: kal16, slt'):
        speech.cast([Sentence("a"), Sentence("good day", "Kal16")], voices)


def test_two_recordings_of_one_voice_are_named(speaking, tmp_path, monkeypatch):
    studio = speaking[0]
    monkeypatch.setattr(studio.codec, "encode", lambda waves: [np.zeros(5, int)] * len(waves))
    folder_of(tmp_path, ("a.wav", "one", 0, {"voice": "bob"}), ("b.wav", "two", 1, {"voice": "bob"}))
    args = SimpleNamespace(**{**vars(studio.args), "voices": str(tmp_path)})
    with pytest.raises(DataError, match="has bob twice"):
        speech.load_voices(args, studio.codec, studio.speaker)


@pytest.mark.parametrize("said, heard", [
    ("fifty turns", "50 turns"), ("twenty-five", "25"), ("in nineteen ninety five", "in 1995"), ("five percent", "5 %"),
    ("twenty dollars", "$20"), ("fifty cents", "50¢"), ("R and D", "R&D"), ("one, two, three, go", "1, 2, 3, go"),
    ("one thousand men", "1,000 men"), ("half past three thirty", "half past 3:30"), ("no one knows", "no 1 knows"),
    ("minus five degrees", "-5°"), ("the twenty first of May", "the 21st of May"), ("three point five", "3.5")])
def test_a_number_is_the_same_in_words_and_in_digits(said, heard):
    assert asr_accuracy(said, heard) == asr_accuracy(heard, said) == 1 and not hallucination(said, heard).found


def test_other_numbers_and_units_stay_errors():
    assert asr_accuracy("fifty dollars", "fifty euros") < 1 and asr_accuracy("minus five", "five") < 1
    assert asr_accuracy("fifteen turns", "50 turns") == 0.5
    assert normalize_text("cinquante", "fr") == "cinquante" and normalize_text("five", "de") == "five"
    assert normalize_text("nine " * 5000) and normalize_text("hundred " * 3000)         # a sample that loops
    assert hallucination("call five now", "call five five five five five five five now").kind == "repetition"
    assert not hallucination("a million", "1000000").found


# ---- a sentence in the place of another ------------------------------------------------------------------------

REPLACED = [("the committee will meet again on monday to decide", "thank you for watching please subscribe"),
            ("he put the book on the table", "i do not know what you are talking about"),
            ("the weather tomorrow will be cold with some rain", "please like and subscribe to my channel"),
            ("now listen the wooden market of tokyo has a hidden beaver",
             "now listen davis carefully covered 8 apples for the soldiers"),
            ("今天天气很好我们去公园散步", "请不吝点赞订阅转发打赏支持")]
MISHEARD = [("walter likes toronto but leo prefers austin in", "to like still and or not lily prefer more stealing"),
            ("the tiger ran through", "that i go on to"), ("neutrinos from the sun", "new treen owes from the son"),
            ("anna and marta met peter", "hannah and martha met pedro"), ("marta", "thanks for watching"),
            ("the children in the castle talked about weather and money",
             "kill running in the castle talk about whether and many")]


@pytest.mark.parametrize("text, heard", REPLACED)
def test_a_sentence_in_the_place_of_another_is_invented(text, heard):
    language = "zh" if text > "z" else "en"
    found = hallucination(text, heard, language)
    assert found.kind == "replaced" and found.reward() == -1
    assert asr_reward(text, heard, language=language, rewards=("R1", "R2")).total == -1


@pytest.mark.parametrize("text, heard", MISHEARD)
def test_what_is_misheard_is_not_invented(text, heard):
    assert hallucination(text, heard).kind != "replaced"


# ---- messages that name the cause ------------------------------------------------------------------------------

def test_a_path_says_why_it_is_not_there(tmp_path):
    nfd, nfc = (unicodedata.normalize(form, "é.wav") for form in ("NFD", "NFC"))
    folder_of(tmp_path, (nfd, "x", 0, {}), ("B.WAV", "x", 1, {}))
    for name, why in ((nfc, "another Unicode form"), ("b.wav", "there is a B.WAV"),
                      ("audio\\B.WAV", "written with /"), ("c.wav", "no such file$")):
        with pytest.raises(DataError, match=why):
            read_audio(tmp_path / name, RATE)


def test_a_git_lfs_pointer_is_named(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (tmp_path / "a.wav").write_text(pointer)
    with pytest.raises(DataError, match="a Git LFS pointer.*git lfs pull"):
        read_audio(tmp_path / "a.wav", RATE)
    (tmp_path / "metadata.jsonl").write_text(pointer)
    with pytest.raises(DataError, match="a Git LFS pointer"):
        load_folder(tmp_path)
    shutil.copytree("checkpoints/asr", tmp_path / "asr")
    (tmp_path / "asr/model.safetensors").write_text(pointer)
    with pytest.raises(DataError, match="model.safetensors is a Git LFS pointer"):
        load_recogniser(str(tmp_path / "asr"))


def test_a_length_just_over_the_limit_is_not_rounded_away(tmp_path):
    folder_of(tmp_path, ("a.wav", "x", 0, {}), seconds=2.001)
    with pytest.raises(DataError, match="2.001 s long, over --max-seconds 2"):
        load_folder(tmp_path, max_seconds=2)


def test_a_step_in_which_no_sample_ends_is_said_once(tmp_path, capsys):
    rows = [(str(u.path.resolve()), u.text, 0, {}) for u in first(3, "data/d1")]
    grpo_asr.main(["--data", str(folder_of(tmp_path / "d", *rows)), "--test", str(folder_of(
        tmp_path / "t", (str(first(1, "data/test/short")[0].path.resolve()), "hello", 0, {}))), "--batch", "2",
        "--group", "2", "--steps", "2", "--max-tokens", "1", "--device", "cpu", "--out", str(tmp_path / "run")])
    assert capsys.readouterr().out.count("no sample came to an end") == 1


# ---- the first line --------------------------------------------------------------------------------------------

def test_a_run_says_what_it_will_train_hold_out_and_adapt(tmp_path, capsys, monkeypatch):
    rows = [(str(u.path.resolve()), u.text, 0, {}) for u in first(20, "data/d0")]
    monkeypatch.setattr(grpo_asr, "self_check", lambda *given: None)
    monkeypatch.setattr(grpo_asr, "evaluate", lambda policy, processor, test, args: ([""] * len(test), {"wer": 0.5}))
    flags = ["--data", str(folder_of(tmp_path / "d", *rows)), "--batch", "2", "--device", "cpu", "--out",
             str(tmp_path / "run")]
    grpo_asr.set_up(grpo_asr.parse_args(flags))
    said = capsys.readouterr().out
    assert "2 of 20 lines of --data are held out" in said
    line = next(line for line in said.splitlines() if line.startswith("trains on"))
    assert line.startswith("trains on 17 clips, ")
    assert "chooses by 1, tests on held-out (2); adapts 28 layers (0." in line
    header = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[0])
    assert header["layers"] == 28 and header["script"] == "grpo_asr"
