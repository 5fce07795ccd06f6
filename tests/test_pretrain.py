"""How the corpus reaches those that learn from it: in parts, as they come. What it says and how needs the programs of
pretrain/corpus.py."""
import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

from pretrain import __main__ as pretrain
from pretrain import asr, parts, tts


@pytest.fixture
def build(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "BUILD", tmp_path)
    return tmp_path


def speech(number, count):
    return {"samples": torch.full((3 * count,), number, dtype=torch.int16), "lengths": torch.full((count,), 3),
            "text": [f"{number} {i}" for i in range(count)], "voice": ["slt"] * count}


def test_a_part_comes_once_and_only_when_it_is_whole(build):
    seen = set()
    parts.save(speech(1, 2), "speech", 1)
    (build / "speech" / "002.half").write_bytes(b"cut off")
    assert [(number, data["text"]) for number, data in parts.come("speech", seen)] == [(1, ["1 0", "1 1"])]
    parts.save(speech(0, 1), "speech", 0)
    assert [number for number, _ in parts.come("speech", seen)] == [0] and parts.come("speech", seen) == []
    parts.write_tokens([{"text": "hi", "voice": "slt", "tokens": [1, 2]}], 3)
    assert parts.come("tokens", set()) == [(3, [{"text": "hi", "voice": "slt", "tokens": [1, 2]}])]
    assert [path.name for path in (build / "tokens").iterdir()] == ["003"]


def test_what_is_for_checking_is_the_end_of_the_first_part(build):
    for number in (0, 1, 2):
        parts.save(speech(number, 2), "speech", number)
    found = parts.all_speech()
    assert found["text"] == ["2 0", "2 1", "1 0", "1 1", "0 0", "0 1"] and found["samples"].tolist()[-6:] == [0] * 6


def test_processes_share_the_parts_out():
    args = SimpleNamespace(count=950, part=100)
    shares = [list(parts.numbers(SimpleNamespace(**vars(args), nth=(k, 3)))) for k in range(3)]
    assert sorted(sum(shares, [])) == list(range(10)) and shares[1] == [1, 4, 7]


def test_the_last_part_may_be_smaller_and_a_kill_between_tokens_and_decoded_costs_neither(build):
    assert [parts.size(SimpleNamespace(count=250, part=100), part) for part in range(3)] == [100, 100, 50]
    rows = [{"text": "hi", "voice": "slt", "tokens": [1]}]
    parts.write_tokens(rows, 0)
    parts.write_tokens(rows, 0)
    assert parts.come("tokens", set()) == [(0, rows)]


def test_a_training_ends_by_its_steps_or_by_the_clock(monkeypatch):
    assert list(parts.pace(SimpleNamespace(minutes=None), 4)) == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]
    clock = iter([20, 45, 95, 130, 999])              # one that waited 20 s ends with the others
    monkeypatch.setattr(parts, "STARTED", 0)
    monkeypatch.setattr(parts.time, "time", lambda: next(clock))
    assert list(parts.pace(SimpleNamespace(minutes=2), 4)) == [(1, 0.25), (2, 0.75), (3, 1.0)]


def test_what_does_not_come_in_time_is_named(build, monkeypatch):
    monkeypatch.setattr(parts, "STARTED", parts.time.time() - 61)
    args = SimpleNamespace(minutes=1, seed=9)
    assert not parts.wait_for(args, "speech", 0) and not parts.wait_for(SimpleNamespace(minutes=None), "speech", 0)
    with pytest.raises(SystemExit, match=r"speech/000.pt: not there; python -m pretrain speech --seed 9 makes it"):
        parts.wait_for_first(args, "speech")
    parts.save(speech(0, 1), "speech", 0)
    assert parts.wait_for(args, "speech", 0)


def test_a_training_goes_on_when_no_part_has_come(tmp_path, monkeypatch, capsys):
    """It looks for new parts every 100 steps, with --tokens in vain."""
    monkeypatch.setattr(tts, "CHECKPOINTS", tmp_path)
    rows = [{"text": f"word {i}", "tokens": [i % 7, 1, 2, 3]} for i in range(16)]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pretrain.main(["token2text", "--tokens", str(tmp_path), "--token2text-steps", "100", "--token2text-batch", "2",
                   "--device", "cpu"])
    assert "token2text step 100 " in capsys.readouterr().out


def test_chunks_are_of_one_voice_and_lose_nobody():
    voices = [("flite", "slt"), ("piper", "joe"), None, ("flite", "awb")]
    rows = [("", "", [], voices[i * 7 % 4], None, "", i) for i in range(50)]
    chunks = asr.of_one_voice(rows, 5)
    assert sorted(sum(chunks, [])) == list(range(50)) and max(map(len, chunks)) == 5
    assert all(len({rows[i][3] for i in places}) == 1 for places in chunks)
    assert rows[chunks[0][0]][3] == ("piper", "joe")                                # the slowest first


@pytest.mark.parametrize("status", [0, 1])
def test_all_that_goes_on_is_started_with_the_flags_that_were_given(tmp_path, monkeypatch, capsys, status):
    commands = []

    def start(command, stdout, **_):
        commands.append(command)
        stdout.write("last words\n")
        return SimpleNamespace(wait=lambda: status * ("tts" in command))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr("sys.argv", ["pretrain", "together", "--minutes", "2", "--seed", "9", "--part", "100"])
    if status:
        with pytest.raises(SystemExit, match="error: tts: their last words are in build/logs"):
            pretrain.main()
    else:
        pretrain.main()
        assert "asr_on: last words" in capsys.readouterr().out
    found = [pretrain.parse_args(command[3:]) for command in commands]
    stages = [args.stages for args in found]
    assert sorted(set(map(tuple, stages))) == [("asr2_on",), ("asr_on",), ("speech",), ("token2text",), ("tokens",),
                                               ("tts",)]
    assert all((args.minutes, args.seed, args.part, args.go_on) == (2, 9, 100, True) for args in found)
    assert sorted(args.nth for args in found if args.stages == ["tokens"]) == [[k, 5] for k in range(5)]
