"""The script itself on the embedded recogniser: a short run, 8-bit, resume, interruption, mistakes of a user."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import grpo_asr
import plot

ROOT = Path(__file__).parent.parent
FAST = ["--device", "cpu", "--batch", "2", "--group", "2", "--data", "data/d0", "--eval-every", "2"]


@pytest.fixture(scope="module")
def tests_folder(tmp_path_factory):
    """Two small test sets: eight utterances of `short`, four of `noise`."""
    root = tmp_path_factory.mktemp("sets")
    for name, count in (("short", 8), ("noise", 4)):
        (root / name).mkdir()
        source = ROOT / "data" / "test" / name
        lines = [json.loads(line) for line in (source / "metadata.jsonl").read_text().splitlines()[:count]]
        rows = [json.dumps({**row, "file_name": str((source / row["file_name"]).resolve())}) for row in lines]
        (root / name / "metadata.jsonl").write_text("\n".join(rows))
    return [str(root / "short"), str(root / "noise")]


def run(tests_folder, out, *flags):
    grpo_asr.main([*FAST, "--test", *tests_folder, "--out", str(out), *flags])
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def script(*flags, **options):
    return subprocess.run([sys.executable, "grpo_asr.py", *flags], cwd=ROOT, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def unbroken(tests_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    return out, run(tests_folder, out, "--steps", "4", "--rewards", "R1,R2,R3")


def test_a_run_leaves_everything_behind(unbroken, capsys):
    out, lines = unbroken
    header, rows = lines[0], [line for line in lines[1:] if "reward" in line]
    assert header["arguments"]["steps"] == 4 and header["seed"] == 1
    assert header["versions"]["torch"] == torch.__version__.split("+")[0]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for key in ("reward", "reward_std", "R1", "R2", "R3", "no_signal", "truncated", "tokens", "kl", "entropy",
                "clipped", "grad_norm", "lr", "tokens_per_s", "seconds", "peak_memory_gib", "peak_by_phase_gib",
                "repetition", "length_ratio", "empty"):
        assert all(key in row for row in rows), key
    assert set(rows[1]["seconds"]) >= {"encode", "rollout", "reward", "update"}
    assert [row["step"] for row in lines[1:] if "eval_wer" in row] == [-1, 1, 3]
    assert rows[0]["kl"] == 0 and rows[3]["kl"] > 0                            # it moved
    assert all(row["clipped"] == 0 for row in rows)                            # and stayed on its own policy
    taught = [row["grad_norm"] for row in rows if row["no_signal"] < 1]
    assert taught and min(taught) > 0
    summary = json.loads((out / "summary.json").read_text())
    for key in ("metric", "before", "after", "best", "steps", "seconds", "phase_seconds", "peak_memory_gib", "test"):
        assert key in summary, key
    assert set(summary["test"]) == {"short", "noise"} and summary["best"] <= summary["before"]
    assert summary["after"] == summary["best"]                                 # the best adapter is what is kept
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert samples[0]["best"]["total"] >= samples[0]["worst"]["total"] and samples[0]["reference"]
    assert (out / "adapter" / "adapter_model.safetensors").exists()


def test_a_gradient_that_is_not_finite_leaves_the_adapter_alone(tests_folder, tmp_path, monkeypatch, capsys):
    sound = grpo_asr.grpo_loss
    monkeypatch.setattr("grpo_asr.grpo_loss", lambda *given: sound(*given) * float("nan"))
    rows = run(tests_folder, tmp_path / "run", "--steps", "2")
    adapter = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["adapter"]
    assert all(not w.any() for name, w in adapter.items() if "lora_B" in name)      # as it began: zero
    assert all(w.isfinite().all() for w in adapter.values())
    assert "step 1: the gradient is not finite, step left out" in capsys.readouterr().out
    assert rows[3]["kl"] == 0


def test_pitfall_23_the_log_holds_what_was_used(tests_folder, tmp_path):
    lines = run(tests_folder, tmp_path / "run", "--steps", "1", "--lr", "1e-3", "--temperature", "0.7")
    assert lines[0]["arguments"]["temperature"] == 0.7 and lines[2]["lr"] == 1e-3
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert state["optimizer"]["param_groups"][0]["lr"] == 1e-3


def test_resume_equals_the_unbroken_run_bit_for_bit(tests_folder, unbroken, tmp_path):
    out = tmp_path / "run"
    run(tests_folder, out, "--steps", "2", "--rewards", "R1,R2,R3")
    grpo_asr.main(["--resume", str(out), "--steps", "4"])
    a, b = ((f / "adapter" / "adapter_model.safetensors").read_bytes() for f in (unbroken[0], out))
    assert a == b
    a, b = (torch.load(f / "state.pt", weights_only=True)["adapter"] for f in (unbroken[0], out))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    timing = ("seconds", "tokens_per_s", "peak_memory_gib", "peak_by_phase_gib")
    same = lambda rows: [{k: v for k, v in r.items() if k not in timing} for r in rows[1:] if "reward" in r]  # noqa: E731
    assert same(lines) == same(unbroken[1])
    assert lines[0]["arguments"]["steps"] == 4                                 # the header says what it was given
    a, b = (json.loads((f / "summary.json").read_text())["test"] for f in (unbroken[0], out))
    assert a == b


def test_the_seed_decides_everything(tests_folder, tmp_path, unbroken):
    again = run(tests_folder, tmp_path / "again", "--steps", "2", "--rewards", "R1,R2,R3")
    other = run(tests_folder, tmp_path / "other", "--steps", "2", "--rewards", "R1,R2,R3", "--seed", "2")
    of = lambda lines: [(row["reward"], row["tokens"]) for row in lines if "reward" in row][:2]  # noqa: E731
    assert of(again) == of(unbroken[1]) != of(other)


def test_the_supervised_control_trains_on_the_references(tests_folder, tmp_path):
    rows = [line for line in run(tests_folder, tmp_path / "run", "--steps", "2", "--supervised") if "reward" in line]
    assert [row["R1"] for row in rows] == [1, 1] and [row["wer"] for row in rows] == [0, 0]
    assert all(row["grad_norm"] > 0 for row in rows) and rows[0]["kl"] == 0 < rows[1]["kl"]


def test_an_8bit_policy_trains(tests_folder, tmp_path, capsys):
    lines = run(tests_folder, tmp_path / "run", "--steps", "3", "--group", "8", "--quantize", "8bit")
    rows = [line for line in lines if "reward" in line]
    assert len(rows) == 3 and rows[2]["kl"] > 0 and rows[0]["clipped"] == 0
    assert "check: |ratio - 1|" in capsys.readouterr().out


def test_gradients_through_8bit_weights_are_those_of_fp32(clips):
    """The adapters of the first layer learn through every quantised layer above: their gradient keeps its direction."""
    from conftest import load_policy
    grads = []
    for quantize in ("none", "8bit"):
        args, processor, policy = load_policy("--quantize", quantize)
        prompts = grpo_asr.encode(policy, grpo_asr.collate(processor, clips[:2], "en"))
        ids = torch.arange(20, 40).expand(2, -1)
        mask = torch.ones_like(ids, dtype=torch.bool)
        grpo_asr.completion_logprobs(policy, prompts, ids, mask, 1, 1.0).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for n, p in policy.named_parameters()
                                if "layers.0" in n and "lora_B" in n]))
    assert torch.cosine_similarity(*grads, dim=0) > 0.9


def test_an_8bit_product_is_that_of_the_weights_it_stands_for(clips):
    """Weights in int8, activations as they are: values and gradients of the plain product, and no copy of the matrix
    kept for the backward pass."""
    from bitsandbytes.nn import Linear8bitLt
    from conftest import load_policy
    _, _, policy = load_policy("--quantize", "8bit")
    layer = next(m for m in policy.modules() if isinstance(m, Linear8bitLt))
    weight = layer.weight.data.float() * (layer.weight.SCB / 127)[:, None]
    x = torch.randn(3, 5, layer.in_features, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    torch.testing.assert_close(y, x @ weight.T, atol=1e-5, rtol=1e-5)
    assert {t.dtype for t in kept if t.ndim == 2} == {torch.int8}
    ours, plain = (torch.autograd.grad(out.square().sum(), x)[0] for out in (y, x @ weight.T))
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)


def test_every_linear_of_the_llm_is_quantised_and_nothing_else():
    """Pitfall 23: a list of modules to leave alone that matches none of them would go unnoticed."""
    from conftest import load_policy
    _, _, policy = load_policy("--quantize", "8bit")
    names = [name for name, module in policy.named_modules()
             if type(module).__name__ == "Linear8bitLt" and name.endswith("base_layer")]
    layers = policy.config.text_config.num_hidden_layers
    assert len(names) == 7 * layers and all("language_model" in name for name in names)


def test_pitfall_14_no_checkpointing_in_the_rollout(recogniser):
    assert not recogniser[2].is_gradient_checkpointing and recogniser[2].config.text_config.use_cache


def test_pitfall_1_a_model_that_does_not_hear_is_refused(recogniser, clips, monkeypatch):
    args, processor, policy = recogniser
    deaf = policy.get_base_model()
    real = deaf.get_audio_features
    def silent(*given, **named):
        out = real(*given, **named)
        out.pooler_output = torch.zeros_like(out.pooler_output)
        return out
    monkeypatch.setattr(deaf, "get_audio_features", silent)
    args.resume = "yes"                                        # the adapters of this fixture are not zero
    try:
        with pytest.raises(grpo_asr.DataError, match="check failed"):
            grpo_asr.self_check(policy, processor, clips[:2], args, torch.device("cpu"))
    finally:
        args.resume = None


def test_interruption_saves_and_says_how_to_go_on(tests_folder, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "grpo_asr.py", *FAST, "--test", *tests_folder, "--out", str(out),
                                "--steps", "5000", "--eval-every", "0"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    log = out / "log.jsonl"
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 3):
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    said, _ = process.communicate()
    assert process.returncode == 0 and f"--resume {out}" in said, said
    steps = json.loads((out / "summary.json").read_text())["steps"]
    assert torch.load(out / "state.pt", weights_only=True)["step"] == steps >= 1


@pytest.mark.parametrize("name", ["grpo_asr.py", "grpo_tts.py", "diffro_tts.py", "plot.py", "pretrain.py",
                                  "prepare.py", "use.py"])
def test_help_answers_without_torch(name):
    code = f"import sys, runpy; sys.argv = ['{name}', '--help']; sys.modules['torch'] = None\n" \
           f"runpy.run_path('{name}', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr


@pytest.mark.parametrize("flags, message", [
    (["--data", "nowhere"], "nowhere: no such folder"),
    (["--model", "nowhere"], "--model nowhere: no such folder"),
    (["--device", "cuda:9"], "--device cuda:9"),
    (["--batch", "100000"], "fewer than --batch"),
    (["--quantize", "4bit", "--device", "cpu"], "4bit needs a GPU"),
    (["--language", "klingon", "--data", "data/test/noise", "--test", "data/test/short"], "--language klingon"),
    (["--data", "data/test/noise", "--test", "data/test/noise"], "no test set with words"),
])
def test_a_users_mistake_gets_one_line(flags, message):
    done = script("--steps", "1", *flags)
    assert done.returncode == 1 and message in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr


@pytest.mark.parametrize("flags, message", [
    (["--rewards", "R9"], "R1,R2,R3"), (["--micro", "5"], "--micro"), (["--group", "1"], "--group must be 2"),
    (["--temperature", "0"], "--temperature"), (["--resume", "nowhere"], "no run there"),
    (["--steps", "many"], "--steps"),
])
def test_a_wrong_flag_answers_at_once(flags, message):
    done = script(*flags)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_pitfall_24_modules_do_nothing_at_import():
    done = subprocess.run([sys.executable, "-c", "import sys; sys.argv = ['x', '--no-such-flag']\n"
                           "import data, rewards, judges, report, listen, corpus, plot, pretrain\n"
                           "import pretrain_tts, grpo_asr, grpo_tts, diffro_tts, prepare, use"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "", done.stderr


def test_curves_are_named_by_what_tells_the_runs_apart():
    grpo = {"batch": 4, "micro": 16, "seed": 1, "lr": 1e-3}
    diffro = {"batch": 32, "micro": 32, "seed": 2, "lr": 1e-3, "method": "diffro", "tau": 1.0}
    runs = [(grpo, []), (diffro, [])]
    assert [plot.label(a, runs) for a, _ in runs] == ["method grpo, batch 4", "method diffro, batch 32"]
    assert plot.label(diffro, [(diffro, []), ({**diffro, "tau": 0.5}, [])]) == "tau 1.0"
    assert plot.label(grpo, [(grpo, []), ({**grpo, "seed": 3}, [])]) == "run"


def test_plot_of_one_run_and_of_several(unbroken, tmp_path, capsys):
    out, _ = unbroken
    plot.main([str(out)])
    assert (out / "curves.png").stat().st_size > 10_000
    plot.main([str(out), str(out), "--out", str(tmp_path / "both.png")])
    assert (tmp_path / "both.png").exists()
    with pytest.raises(SystemExit, match="no readable log.jsonl"):
        plot.main([str(tmp_path)])
