"""GSM8K-Aug: from the text files of iCoT (github.com/da03/Internalize_CoT_Step_by_Step, data/gsm8k) to problems.

One problem per line, `question||step step ... #### answer`; the result equals the official code's conversion. A problem
without a chain gets one empty step, as there.
"""

from __future__ import annotations

import os
from pathlib import Path

from tqdm import tqdm

from coconut_fast.data.examples import Example, read_text


def read_gsm8k(path: str | os.PathLike[str]) -> list[Example]:
    """Read one of the text files; blank lines are skipped. ValueError names the file, the line and what is wrong."""
    path = Path(path)
    examples = []
    lines = tqdm(read_text(path).split("\n"), desc=f"read {path.name}", unit="line", delay=2)
    for number, line in enumerate(lines, 1):
        if line.strip():
            examples.append(_problem(line, f"{path}: line {number}"))
    if not examples:
        raise ValueError(f"{path}: the file is empty; expected lines of the form question||steps #### answer")
    return examples


def _problem(line: str, where: str) -> Example:
    parts = line.split("||")
    if len(parts) != 2:
        raise ValueError(f"{where}: found {len(parts) - 1} times '||', expected once: question||steps #### answer")
    question, rest = parts
    if "##" not in rest:
        raise ValueError(f"{where}: found no '####' after '||', expected question||steps #### answer")
    answer = rest.split("##")[-1].strip()
    for name, text in (("question", question), ("answer", answer)):
        if not text.strip():
            raise ValueError(f"{where}: the {name} is empty, expected question||steps #### answer")
    return Example(question, rest.split("##")[0].strip().split(" "), answer)
