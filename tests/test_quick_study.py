"""One cell of the committed study, carried out again as a reader does."""

from dataclasses import replace

import pytest

from diffussm.study import read_study
from diffussm.study_report import answers
from diffussm.study_runs import read_rows, run_study
from tools.book import ROOT

STUDIES = ROOT / "studies"


@pytest.mark.slow
def test_who_runs_one_cell_gets_its_figures_again_within_their_spread(tmp_path):
    study = read_study(STUDIES / "quick.yaml")
    committed = answers(study, read_rows(STUDIES / "results" / "quick.jsonl"))
    rows = run_study(study, tmp_path, only="patches, patch 2")
    assert len(rows) == study.seeds
    again = answers(study, rows)["patches"]
    for by in ("bits", "loss"):
        asked = replace(again.question, by=by)
        first, second = (
            replace(answer, question=asked).measured("patch 2")
            for answer in (committed["patches"], again)
        )
        spread = max(first.values()) - min(first.values())
        assert first.keys() == second.keys() and spread > 0
        for seed, value in first.items():
            assert second[seed] == pytest.approx(value, abs=spread), (by, seed)
