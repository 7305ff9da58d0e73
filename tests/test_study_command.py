"""`diffussm study`: what is typed, and what is said."""

import pytest
from commands import diffussm

TEXT = """
recipe: digits
options:
  steps: 6
  warmup: 2
  cooldown: 2
  batch_size: 8
  model.d_model: 16
  model.n_blocks: 1
  model.d_state: 4
seeds: 2
looks: 1
measure: {bits_steps: [2], bits_images: 4, score_images: 0}
questions:
  down-sampling:
    asks: Does it cost quality?
    runs: {M = 1: {model.downsample: 1}, M = 2: {}}
"""


@pytest.mark.slow
def test_a_study_is_listed_carried_out_kept_and_reported(tmp_path):
    (tmp_path / "study.yaml").write_text(TEXT)
    study = "study {t}/study.yaml --out {t}/out --workers 1 --device cpu"
    said = diffussm(f"{study} --list", t=tmp_path)
    assert "down-sampling, M = 1: 6 steps," in said and "0 of 2 seeds finished" in said
    assert "4 runs are missing" in said and not list(tmp_path.glob("out/runs"))
    assert "has no rows yet" in diffussm(f"{study} --report", 1, t=tmp_path)
    said = diffussm(f"{study} --record {{t}}/kept/rows.jsonl", t=tmp_path)
    assert said.count("held-out loss") == 4 and "4 of 4 runs are in" in said
    kept = tmp_path / "kept" / "rows.jsonl"
    lines = kept.read_text()
    assert lines == (tmp_path / "out" / "results.jsonl").read_text()
    kept.write_text('{"digest": "another"}\n')
    said = diffussm(f"{study} --record {{t}}/kept/rows.jsonl", t=tmp_path)
    assert "held-out loss" not in said
    assert kept.read_text() == '{"digest": "another"}\n' + lines
    assert "0 runs are missing: 0.00 h" in diffussm(f"{study} --list", t=tmp_path)
    other = study.replace("/out", "/elsewhere") + " --known {t}/kept/rows.jsonl"
    assert "4 of 4 runs are in" in diffussm(other, t=tmp_path)
    there = tmp_path / "elsewhere" / "results.jsonl"
    assert sorted(there.read_text().splitlines()) == sorted(lines.splitlines())
    assert not (tmp_path / "elsewhere" / "runs").exists()
    assert "0 runs are missing: 0.00 h" in diffussm(f"{other} --list", t=tmp_path)
    one = "down-sampling, M = 2"
    said = diffussm(f"{study} --list --only {{one}}", t=tmp_path, one=one)
    assert "down-sampling, M = 2: 6 steps," in said and "M = 1" not in said
    told = diffussm(f"{study} --only M", 1, t=tmp_path)
    assert "down-sampling, M = 1" in told
    new = study.replace("/out", "/one")
    said = diffussm(f"{new} --quick", t=tmp_path)
    assert said.count("seed 0: ") == 2 == said.count("held-out loss")
    assert "2 of 2 runs are in" in said
    assert "2 runs are missing" in diffussm(f"{new} --list", t=tmp_path)
    assert "names no file" in diffussm(f"{study} --time", 1, t=tmp_path)
    said = diffussm(f"{study} --report", t=tmp_path)
    assert "Does it cost quality?" in (tmp_path / "out" / "report.md").read_text()


def test_what_cannot_work_is_refused(tmp_path):
    (tmp_path / "study.yaml").write_text(TEXT.replace("d_state: 4", "d_state: 5"))
    study = "study {t}/study.yaml --out {t}/out"
    assert "no run was started: " in diffussm(study, 1, t=tmp_path)
    assert not (tmp_path / "out").exists()
    told = diffussm(f"{study} --known {{t}}/rows.jsonl", 1, t=tmp_path)
    assert "rows.jsonl: expected a file of rows, as --record writes" in told
    assert "give one of" in diffussm(f"{study} --list --report", 1, t=tmp_path)
    told = diffussm(f"{study} --time --only x", 1, t=tmp_path)
    assert "--only is for runs and --list" in told
    told = diffussm(f"{study} --report --quick", 1, t=tmp_path)
    assert "--quick is for runs and --list" in told
    told = diffussm(f"{study} --report --known x", 1, t=tmp_path)
    assert "--known is for runs and --list" in told
    assert "--device gpux" in diffussm(f"{study} --device gpux", 1, t=tmp_path)
    assert "there is no" in diffussm("study nothing.yaml --out {t}/x", 1, t=tmp_path)
    assert "--out OUT is missing" in diffussm("study x.yaml", 2)
