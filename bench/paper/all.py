"""Run the experiments and write their tables and plots: README.md of this folder, and measured/.

    python bench/paper/all.py                  # all of them; under 20 minutes on two CPUs
    python bench/paper/all.py table1 votes     # these two; README.md is written anew with all that has been measured
    python bench/paper/all.py --quick --out /tmp/paper    # a few seconds each: whether they run

Each experiment is a process of its own with one thread, some start more; two run at a time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import common

HERE = Path(__file__).parent
EXPERIMENTS = (
    "table1",
    "figures_1_2",
    "theorems",
    "votes",
    "figure_a1",
    "figure3_language",
    "figure3_digits",
    "byzantine",
)
AT_A_TIME = 2
TIMEOUT = 1200.0  # seconds, of one experiment

INTRODUCTION = """\
# The paper's experiments

The tables, figures and theorems of [signSGD](https://arxiv.org/abs/1802.04434) (Bernstein et al. 2018), measured with
signvote on a small machine. Each section is what one script of this folder printed; a sentence that says whether a
result agrees with the paper is made from the numbers of its own run.

```bash
pip install '.[paper]'         # matplotlib and scikit-learn
python bench/paper/all.py      # all of it; under 20 minutes on two CPUs
python bench/paper/votes.py    # one, into signvote-bench/; --quick for a few seconds' worth
```
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = common.parser(__doc__, HERE)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(EXPERIMENTS)}; all unless given")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in EXPERIMENTS]:
        parser.error(f"argument NAME: expected one of {', '.join(EXPERIMENTS)}, got {', '.join(unknown)}")
    if options.quick and options.out == HERE:
        parser.error("argument --quick: expected --out with it, so that what was measured in full stays")
    measured, readme = options.out / "measured", options.out / "README.md"
    begin = time.perf_counter()
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        names = options.names or EXPERIMENTS
        statuses = list(pool.map(lambda name: run(name, measured, options.quick), names))
    readme.write_text(report(measured), encoding="utf-8")
    print(f"Written: {readme}, {measured}; {time.perf_counter() - begin:.0f} s")
    return int(any(statuses))


def run(name: str, measured: Path, quick: bool) -> int:
    """Run one experiment as a process; what it prints is shown if it fails."""
    command = [sys.executable, str(HERE / f"{name}.py"), "--out", str(measured), *(["--quick"] if quick else [])]
    begin = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        print(f"{name}: not done after {TIMEOUT:g} s", flush=True)
        return 1
    print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
    if done.returncode != 0:
        print(f"{name}: ended with status {done.returncode}\n{done.stdout}{done.stderr}", file=sys.stderr, flush=True)
    return done.returncode


def report(measured: Path) -> str:
    """The text of README.md: of every experiment whose JSON is in `measured`."""
    paths = [measured / f"{name}.json" for name in EXPERIMENTS]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
    sections = [INTRODUCTION, *map(section, found)]
    if found:
        sections.append(conditions(found))
    return "\n".join(sections)


def section(document: dict[str, Any]) -> str:
    lines = [f"## {document['title']}", "", document["markdown"].strip(), ""]
    if document["plot"] is not None:
        lines += [f"![{document['title']}](measured/{document['plot']})", ""]
    return "\n".join(lines)


def conditions(found: Sequence[dict[str, Any]]) -> str:
    """On which machine, with what and how long; one line for each kind of machine and versions."""
    lines = ["## Machine", ""]
    places: dict[str, list[dict[str, Any]]] = {}
    for document in found:
        machine, versions = document["machine"], document["versions"]
        names = ", ".join(f"{name} {version}" for name, version in versions.items())
        where = f"{machine['cpu']}, {machine['cpus']} CPUs, {machine['implementations'][0]}; {names}"
        places.setdefault(where, []).append(document)
    for where, documents in places.items():
        lines += [f"{where}:", ""]
        rows = [
            [f"[{one['name']}.py]({one['name']}.py)", f"{one['seconds']:.0f}", "yes" if one["quick"] else "no"]
            for one in documents
        ]
        lines += [common.table(["experiment", "seconds", "quick"], rows), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
