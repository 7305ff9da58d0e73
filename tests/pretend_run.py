"""`python pretend_run.py HOW CONFIG --out RUN ...`: what a run writes, and no run.

It starts in a moment, and goes wrong in one of many ways, as HOW says.
"""

import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path

HOW, config, _, out = sys.argv[1:5]
FACTORS = {"differs": 1.5, "rounds": 1 + 1e-6}


def main() -> None:
    """Log a line for each so many steps, and save once, until somebody kills it."""
    wanted = json.loads(Path(config).read_text())
    every, batch = wanted["execution"]["log_every"], wanted["recipe"]["batch_size"]
    (middle,) = map(int, wanted["execution"]["keep"])
    log, saved = Path(out) / "log.jsonl", Path(out) / f"checkpoints/step_{middle:08d}"
    resumed, first = saved.is_dir(), os.environ["RANK"] == "0"
    begun = middle if resumed and HOW != "forgets" else 0
    if resumed and first:
        lines = log.read_text().splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] <= begun]
        draft = log.with_name("draft")
        draft.write_text("".join(kept))
        draft.replace(log)
    if notes := os.environ.get("PRETEND_NOTES"):
        names = "RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"
        told = {name: os.environ.get(name) for name in names}
        with Path(notes).open("a") as file:
            file.write(json.dumps(told | {"words": sys.argv[2:]}) + "\n")
        while len(Path(notes).read_text().splitlines()) % 2 and HOW == "well":
            time.sleep(0.01)  # a killed one must have said that it was there
    for step in itertools.count(begun + 1):
        time.sleep(0.003)
        if step == 7 and HOW == "stuck":
            time.sleep(600)
        if step == 7 and HOW == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 7 and (HOW == "fails" or f"fails {os.environ['RANK']}" == HOW):
            raise SystemExit("no space left on this disk")
        if step == 7 and HOW.startswith("fails "):
            time.sleep(600)  # as a real one does, for the sum with the one that failed
        if step == middle + 1 and first and not resumed:
            saved.mkdir(parents=True)
            (saved / "weights").write_bytes(bytes(2_500_000))
        if step % every == 0 and first:
            loss = FACTORS.get(HOW, 1.0) / step if resumed else 1 / step
            row = {"step": step, "images": step * batch, "loss": loss}
            row |= {"seconds": time.time(), "images_per_second": 80.0}
            row |= {"data_wait": 0.3 if HOW == "slow in data" else 0.0}
            if HOW == "not finite" and step > 8:
                row["skipped"] = [8]
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
