"""Curves: what of a log is drawn, and how runs are told apart."""
import json
import random

import pytest

from tools import plot


def leave_log(folder, rows, **arguments):
    folder.mkdir(parents=True)
    lines = [{"arguments": {"seed": 1, "batch": 4, **arguments}}, *rows]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def test_curves_are_named_by_what_tells_the_runs_apart():
    grpo = {"batch": 4, "micro": 16, "seed": 1, "lr": 1e-3}
    diffro = {"batch": 32, "micro": 32, "seed": 2, "lr": 1e-3, "method": "diffro", "tau": 1.0}
    assert plot.label(grpo, [grpo, diffro]) == "method grpo, batch 4"
    assert plot.label(diffro, [grpo, diffro]) == "method diffro, batch 32"
    assert plot.label(diffro, [diffro, {**diffro, "tau": 0.5}]) == "tau 1.0"
    assert plot.label(grpo, [grpo, {**grpo, "seed": 3}]) == "run"


@pytest.mark.parametrize("steps", [1, 25, 26, 199, 200, 1500])
def test_a_training_curve_is_thinned_to_means_and_an_evaluation_is_not(steps):
    draw = random.Random(steps)
    rows = [{"step": -1, "set": "short", "eval_wer": 0.123456}]
    for step in range(steps):
        rows.append({"step": step, "kl": draw.random(), "wer": None if step == 7 else draw.random(), "R1": 1.0})
        if step % 5 == 4:
            rows.append({"step": step, "eval": {"wer": draw.random(), "insertions": 0.1}})
    found = plot.curves(rows)
    assert set(found) == {"kl", "wer", "eval_wer"} | ({"eval_insertions"} if steps > 4 else set())
    evaluated = {row["step"] + 1: row["eval"]["wer"] for row in rows if "eval" in row}
    assert found["eval_wer"] == {0: 0.123456, **evaluated}
    width = next(w for w in range(1, steps + 1) if steps / w <= 25)
    assert len(found["kl"]) <= 25 and list(found["kl"]) == [s + width // 2 for s in range(0, steps, width)]
    for key in ("kl", "wer"):
        for middle, value in found[key].items():
            values = [row[key] for row in rows if key in row and row[key] is not None
                      and row["step"] // width == middle // width]
            assert value == pytest.approx(sum(values) / len(values), rel=1e-3)


def test_seeds_become_one_curve_with_their_mean_and_spread():
    figure, axis = plot.plt.subplots()
    plot.draw_panel(axis, "eval_wer", {
        "both": [{"eval_wer": {0: 0.2, 50: 0.1}}, {"eval_wer": {0: 0.4, 50: 0.1, 60: 9}}],
        "none": [{"kl": {0: 1}}], "one": [{"eval_wer": {0: 0.5}}]})
    assert [line.get_label() for line in axis.lines] == ["both (2 seeds)", "one"]
    assert axis.lines[0].get_xydata().tolist() == [[0, pytest.approx(30)], [50, pytest.approx(10)]]
    band = axis.collections[0].get_paths()[0].vertices
    assert {(x, round(y)) for x, y in band} == {(0, 20), (0, 40), (50, 10)}
    plot.plt.close(figure)


def test_plot_of_one_run_and_of_several(tmp_path, capsys):
    rows = [{"step": -1, "eval_wer": 0.5}, {"step": 0, "kl": 0.0, "reward": 0.5}, {"step": 1, "kl": 0.1, "reward": 0.6}]
    one, other = (leave_log(tmp_path / name, rows, lr=lr) for name, lr in (("a", 1e-3), ("b", 1e-4)))
    plot.main([one])
    assert (tmp_path / "a/curves.png").stat().st_size > 10_000
    plot.main([one, other, "--out", str(tmp_path / "both.png")])
    assert (tmp_path / "both.png").exists() and capsys.readouterr().out.splitlines()[1] == f"{tmp_path}/both.png"


@pytest.mark.parametrize("text, message", [(None, "a readable log"), ("", "a readable log"), ("[1]\n", "a readable"),
                                           ("{not\n", "a readable log"), ('{"seed": 1}\n', "a readable log"),
                                           ('{"arguments": {}}\n{"step": 0, "kl"', "no step logged yet")])
def test_what_is_no_log_gets_one_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(SystemExit, match=message):
        plot.main([str(tmp_path)])


def test_a_picture_that_cannot_be_written_gets_one_line(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"arguments": {}}\n{"step": 0, "kl": 0.1}\n')
    for out in ("nowhere/a.png", "a.xyz"):
        with pytest.raises(SystemExit, match="cannot be written"):
            plot.main([str(tmp_path), "--out", str(tmp_path / out)])
