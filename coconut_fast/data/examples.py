"""Problems as the field stores them: a question, reasoning steps and an answer, in a JSON list or in JSON lines.

Reading checks everything before anything runs: an error in a file is one ValueError that names the file, the record
(counted from 1), the field, what was found and what was expected.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from coconut_fast.files import write_atomically

AT_ONCE = 4096  # problems tokenized in one call: enough for a tokenizer's threads, few enough to move a progress bar


@dataclass(frozen=True, slots=True)
class Example:
    """One problem; `extra` holds the record's other keys (ProsQA: the graph), which are kept when it is written."""

    question: str
    steps: list[str]
    answer: str
    extra: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The JSON object of this problem, keys in the order of the released files."""
        return {"question": self.question, "answer": self.answer, "steps": self.steps, **self.extra}


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """Token ids of one problem. `answer_ids` ends with end-of-text; `idx` is its place in the data set.

    Graph problems may carry two more fields: `frontiers[k]`, the ids of the nodes that are correct after k + 1 hops,
    for targets that name one node of a frontier; and `cue`, the number of leading answer tokens that targets other than
    "chain" put into the prompt (the "[A]" that asks for the answer).
    """

    question_ids: list[int]
    steps_ids: list[list[int]]
    answer_ids: list[int]
    idx: int = 0
    frontiers: list[list[int]] | None = None
    cue: int = 0


def read_examples(path: str | os.PathLike[str]) -> list[Example]:
    """Read a JSON list of records, or JSON lines (one record per line; blank lines are skipped).

    A record is an object with `question` (non-empty string), `steps` (list of strings, may be empty) and `answer`
    (non-empty string); every other key goes to `Example.extra`. A file is JSON lines where its name ends in
    ".jsonl" or its first character is not "[". ValueError on any problem, and on a file without records.
    """
    path = Path(path)
    bar = tqdm(_records(path), desc=f"read {path.name}", unit="problem", delay=2)
    return [parse_record(record, where) for where, record in bar]


def read_questions(path: str | os.PathLike[str]) -> list[str]:
    """The questions of such a file; its records need no other field."""
    questions = []
    for where, record in _records(Path(path)):
        if not isinstance(record, dict) or "question" not in record:
            raise ValueError(f"{where}: found {_kind(record)}, expected an object with a question")
        questions.append(_checked_text(record["question"], f"{where}, field 'question'"))
    return questions


def _records(path: Path) -> list[tuple[str, Any]]:
    """(location, decoded JSON) of every record."""
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path}: the file is empty; expected a JSON list of records, or one record per line")
    if path.suffix == ".jsonl" or not text.lstrip().startswith("["):
        return _json_lines(path, text)
    return _json_list(path, text)


def parse_record(record: Any, where: str) -> Example:
    """An Example from a decoded JSON object; `where` ("file.json: record 3") opens every error message."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: found {_kind(record)}, expected an object with question, steps and answer")
    for name in ("question", "steps", "answer"):
        if name not in record:
            found = ", ".join(map(repr, record)) or "none"
            raise ValueError(f"{where}: the field {name!r} is missing (fields found: {found})")
    question = _checked_text(record["question"], f"{where}, field 'question'")
    answer = _checked_text(record["answer"], f"{where}, field 'answer'")
    steps = record["steps"]
    if not isinstance(steps, list):
        raise ValueError(f"{where}, field 'steps': found {_kind(steps)}, expected a list of strings")
    steps = [_checked_text(step, f"{where}, field 'steps', step {i}", empty=True) for i, step in enumerate(steps, 1)]
    extra = {key: value for key, value in record.items() if key not in ("question", "steps", "answer")}
    return Example(question, steps, answer, extra)


def write_examples(path: str | os.PathLike[str], examples: Iterable[Example]) -> None:
    """Write a JSON list, or JSON lines where the name ends in ".jsonl"; atomically, so never half a data set."""
    with write_atomically(path) as file:
        if Path(path).suffix == ".jsonl":
            for example in examples:
                file.write(json.dumps(example.record(), ensure_ascii=False) + "\n")
        else:
            json.dump([example.record() for example in examples], file, ensure_ascii=False)
            file.write("\n")


def tokenize_examples(examples: Sequence[Example], tokenizer: Any, where: str = "the data") -> list[TokenizedExample]:
    """Tokenize as the official code does, with any Hugging Face tokenizer.

    The question and "\\n" with the tokenizer's special tokens; each step and "\\n" without; "### " and the answer
    without, then end-of-text. The pieces are tokenized separately, so a tokenizer that merges across them is fine.
    where: the file the problems are from. ValueError if the tokenizer has no end-of-text token, or no token for a word;
    a warning if it maps words to its unknown token.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no eos_token; an answer must end with one")
    tokenized: list[TokenizedExample] = []
    with tqdm(total=len(examples), desc="tokenize", unit="problem", delay=2) as bar:
        for start in range(0, len(examples), AT_ONCE):
            some = examples[start : start + AT_ONCE]
            try:
                questions = _encode(tokenizer, [example.question + "\n" for example in some], special=True)
                chains = _encode(tokenizer, [step + "\n" for example in some for step in example.steps], special=False)
                answers = _encode(tokenizer, ["### " + example.answer for example in some], special=False)
            except Exception as error:
                if type(error) is not Exception:
                    raise  # tokenizers raises the bare class for an unknown word, if it has no unknown token
                raise _unreadable(some, tokenizer, start, where) from error
            steps = iter(chains)
            tokenized += [
                TokenizedExample(question, [next(steps) for _ in example.steps], [*answer, eos], idx)
                for idx, (example, question, answer) in enumerate(zip(some, questions, answers, strict=True), start)
            ]
            bar.update(len(some))
    texts = (" ".join((e.question, *e.steps, "###", e.answer)) for e in examples)
    pieces = ((e.question_ids, *e.steps_ids, e.answer_ids) for e in tokenized)
    warn_of_unknown(tokenizer, zip(texts, pieces, strict=True), where, "record", 1)
    return tokenized


def _unreadable(examples: Sequence[Example], tokenizer: Any, start: int, where: str) -> ValueError:
    for number, example in enumerate(examples, start + 1):
        for name, text in (
            ("question", example.question),
            *(("steps", step) for step in example.steps),
            ("answer", f"### {example.answer}"),
        ):
            if (word := unknown_word(tokenizer, text)) is not None:
                return ValueError(
                    f"{where}: record {number}, field {name!r}: found {word!r}, which is none of the "
                    f"{len(tokenizer.get_vocab())} words of the model's tokenizer"
                )
    return ValueError(f"{where}: the model's tokenizer cannot read records {start + 1} to {start + len(examples)}")


def warn_of_unknown(
    tokenizer: Any, read: Iterable[tuple[str, Iterable[Sequence[int]]]], where: str, each: str, start: int
) -> None:
    """Warns if words of a text became the unknown token: how many did, and the first of them.

    read: pairs of a text and its token ids in pieces; the message numbers them from `start`, as `each` ("record") of
    `where`.
    """
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        return  # GPT-2 uses its end-of-text as the unknown token, too, and knows all bytes
    count, first = 0, ""
    for number, (text, pieces) in enumerate(read, start):
        found = sum(ids.count(unknown) for ids in pieces)
        if found and not count:
            word = unknown_word(tokenizer, text)
            first = f"{'white space or the like' if word is None else repr(word)} in {each} {number}"
        count += found
    if count:
        warnings.warn(
            f"{where}: the tokenizer does not know {count} of the words, first {first}; "
            f"the model reads them as {tokenizer.unk_token}",
            stacklevel=3,
        )


def unknown_word(tokenizer: Any, text: str) -> str | None:
    """The first word of a text that a tokenizer has no token for, or only the unknown one; None: it knows them all."""

    def known(word: str) -> bool:
        try:
            return tokenizer.unk_token_id not in tokenizer.encode(word, add_special_tokens=False)
        except Exception:  # tokenizers raises nothing narrower
            return False

    return next((word for word in text.split() if not known(word)), None)


def _encode(tokenizer: Any, texts: list[str], *, special: bool) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=special, return_attention_mask=False)["input_ids"]


def read_text(path: Path, expected: str = "a file of problems") -> str:
    """The whole of a UTF-8 file (a byte order mark is dropped). ValueError where it cannot be read or is not UTF-8."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); expected {expected}") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{raw[error.start]:02x} on line {line}"
        raise ValueError(f"{path}: not UTF-8 ({found}); expected UTF-8") from error


def _json_list(path: Path, text: str) -> list[tuple[str, Any]]:
    try:
        records = json.loads(text, object_pairs_hook=_each_key_once)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: broken JSON on line {error.lineno}, column {error.colno}: {error.msg}") from error
    except (RecursionError, ValueError) as error:  # nested too deep, or a number of thousands of digits
        raise ValueError(f"{path}: broken JSON: {error}") from error
    if not records:
        raise ValueError(f"{path}: the list is empty; expected at least one record")
    return [(f"{path}: record {number}", record) for number, record in enumerate(records, 1)]


def _json_lines(path: Path, text: str) -> list[tuple[str, Any]]:
    records: list[tuple[str, Any]] = []
    for line_number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}: record {len(records) + 1} (line {line_number})"
        try:
            records.append((where, json.loads(line, object_pairs_hook=_each_key_once)))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}: broken JSON at column {error.colno}: {error.msg}; expected one whole record per line, "
                'or a file that is one JSON list ("[...]")'
            ) from error
        except (RecursionError, ValueError) as error:
            raise ValueError(f"{where}: broken JSON: {error}") from error
    return records


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError for a key that it has twice, of which Python would take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"found the key {twice!r} {keys.count(twice)} times in an object, expected it once")
    return found


def _checked_text(value: Any, where: str, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: found {_kind(value)}, expected a string")
    if not empty and not value.strip():
        raise ValueError(f"{where}: found an empty string, expected text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: found half a surrogate pair (character {error.start})") from error
    return value


def _kind(value: Any) -> str:
    """The kind of a JSON value, in words, with the start of its text."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    shown = json.dumps(value, ensure_ascii=True)
    name = names.get(type(value), "a number")
    return name if value is None else f"{name} ({shown if len(shown) <= 40 else shown[:37] + '...'})"
