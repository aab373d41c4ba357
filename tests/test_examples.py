"""Reading, writing and tokenizing problems; files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from coconut_fast.data.examples import Example, read_examples, tokenize_examples, write_examples
from coconut_fast.files import write_atomically, write_json

GOOD = {"question": "Is Tom a cat?", "answer": "True", "steps": ["Tom is a tabby.", "Every tabby is a cat."]}


def save(folder, content, name="set.json"):
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_json_and_json_lines_read_alike(tmp_path):
    second = {**GOOD, "steps": [], "edges": [[0, 1]], "root": 0}
    expected = [
        Example(GOOD["question"], GOOD["steps"], "True"),
        Example(GOOD["question"], [], "True", {"edges": [[0, 1]], "root": 0}),
    ]
    lines = json.dumps(GOOD) + "\n\n" + json.dumps(second) + "\n"
    assert read_examples(save(tmp_path, [GOOD, second])) == expected
    assert read_examples(save(tmp_path, "\n  " + json.dumps([GOOD, second], indent=1))) == expected
    assert read_examples(save(tmp_path, lines, "set.jsonl")) == expected
    assert read_examples(save(tmp_path, lines, "lines.txt")) == expected
    assert read_examples(save(tmp_path, b"\xef\xbb\xbf" + lines.replace("\n", "\r\n").encode())) == expected


@pytest.mark.parametrize("name", ["out.json", "out.jsonl"])
def test_written_examples_read_back(tmp_path, name):
    examples = [
        Example("Über\nwas?", ["a", "b\u2028c"], "日本", {"edges": [[0, 1]], "root": 1}),
        Example("q", [], "a"),
    ]
    write_examples(tmp_path / "new folder" / name, examples)
    assert read_examples(tmp_path / "new folder" / name) == examples
    assert list(examples[0].record()) == ["question", "answer", "steps", "edges", "root"]


def changed(**fields):
    return [GOOD, {**GOOD, **fields}]


BROKEN = {
    "missing field": ([GOOD, {"question": "q", "answer": "a"}], "record 2: the field 'steps' is missing .*'answer'"),
    "answer is a number": (changed(answer=7), r"record 2, field 'answer': found a number \(7\), expected a string"),
    "question is null": (changed(question=None), "record 2, field 'question': found null, expected a string"),
    "empty question": (changed(question="  "), "record 2, field 'question': found an empty string, expected text"),
    "steps is a string": (changed(steps="a b"), r"field 'steps': found a string \(\"a b\"\), expected a list"),
    "a step is a list": (changed(steps=["a", ["b"]]), r"field 'steps', step 2: found a list .*expected a string"),
    "a step is a boolean": (changed(steps=[True]), r"step 1: found a boolean \(true\), expected a string"),
    "record is a string": ([GOOD, "text"], r"record 2: found a string \(\"text\"\), expected an object"),
    "half a surrogate": ('[{"question": "\\ud800", "answer": "a", "steps": []}]', "record 1, field 'question': .*surr"),
    "broken list": ('[{"question": "q",\n "answer": }]', "broken JSON on line 2, column 12"),
    "cut list": ('[{"question": "q"', "broken JSON on line 1"),
    "nested too deep": ("[" * 100_000, "broken JSON: maximum recursion depth exceeded"),
    "a number without end": ("[" + "1" * 5000 + "]", "broken JSON: Exceeds the limit"),
    "a key twice": (
        '[{"question": "q", "answer": "a", "answer": "b", "steps": []}]',
        "broken JSON: found the key 'answer' 2 times in an object, expected it once",
    ),
    "an empty list": ([], "the list is empty; expected at least one record"),
    "an empty file": ("", "the file is empty; expected"),
    "only blanks": (" \n\n", "the file is empty; expected"),
    "not UTF-8": (b'[\n{"question": "\xff"}]', "not UTF-8 .byte 0xff on line 2"),
    "indented object": (
        '{\n "question": "q"}',
        "record 1 .line 1.: broken JSON at column 2.*one whole record",
    ),
}


@pytest.mark.parametrize("content, message", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_one_clear_error(tmp_path, content, message):
    path = save(tmp_path, content)
    with pytest.raises(ValueError, match=message) as caught:
        read_examples(path)
    assert str(path) in str(caught.value)


def test_a_broken_json_line_is_named(tmp_path):
    path = save(tmp_path, json.dumps(GOOD) + "\n\n{oops\n", "set.jsonl")
    with pytest.raises(ValueError, match=r"set.jsonl: record 2 \(line 3\): broken JSON at column 2"):
        read_examples(path)
    path = save(tmp_path, json.dumps(GOOD) + '\n{"steps": [], "steps": []}', "set.jsonl")
    with pytest.raises(ValueError, match=r"set.jsonl: record 2 \(line 2\): broken JSON: found the key 'steps' 2 times"):
        read_examples(path)
    path = save(tmp_path, json.dumps(GOOD) + "\n" + "[" * 100_000, "set.jsonl")
    with pytest.raises(ValueError, match=r"set.jsonl: record 2 \(line 2\): broken JSON: maximum recursion"):
        read_examples(path)


def test_a_missing_file_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.json: cannot be read"):
        read_examples(tmp_path / "nowhere.json")


def test_atomic_write_keeps_the_old_file_on_failure(tmp_path):
    path = tmp_path / "a.txt"
    with write_atomically(path) as file:
        file.write("old")
    with pytest.raises(KeyError), write_atomically(path) as file:
        file.write("half of the ne")
        file.flush()
        raise KeyError("interrupted")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]
    with pytest.raises(TypeError):
        write_json(path, {"not": object()})
    assert path.read_text() == "old"
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"), write_atomically(path):
        raise OSError(28, "No space left on device")  # as raised on a full disk, without a file name
    path.chmod(0o600)
    with write_atomically(path, binary=True) as file:
        file.write(b"\0\1")
    assert path.read_bytes() == b"\0\1"
    assert path.stat().st_mode & 0o777 == 0o600
    value = {"ä": [1], "data": os.fsdecode(b"\xff.json")}  # a path that is not UTF-8
    write_json(path, value)
    assert json.loads(path.read_text(encoding="utf-8")) == value
    with pytest.raises(ValueError, match="a folder is there"), write_atomically(tmp_path):
        pass
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="a device is there"), write_atomically(tmp_path / "pipe"):
        pass


def test_a_link_is_written_through(tmp_path):
    """A file that lives on another disk stays there, with its link."""
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "link").symlink_to("disk/metrics.jsonl")
    for text in ("first", "second"):  # the file need not be there yet
        with write_atomically(tmp_path / "link") as file:
            file.write(text)
        assert (tmp_path / "link").is_symlink() and (disk / "metrics.jsonl").read_text() == text
    with pytest.raises(KeyError), write_atomically(tmp_path / "link"):
        raise KeyError("interrupted")
    assert (disk / "metrics.jsonl").read_text() == "second"
    assert sorted(os.listdir(tmp_path)) == ["disk", "link"] and os.listdir(disk) == ["metrics.jsonl"]


class LetterTokenizer:
    """A tokenizer that shows how it was called: one id per character, after a 1 if special tokens are requested."""

    eos_token_id = 0

    def __call__(self, texts, add_special_tokens, return_attention_mask):
        return {"input_ids": [[1] * add_special_tokens + [ord(c) for c in text] for text in texts]}


def test_tokenize_as_the_official_code():
    examples = [Example("Q", ["s", "t"], "A"), Example("R", [], "B"), Example("S", ["u"], "C")]
    rows = tokenize_examples(examples, LetterTokenizer())
    assert [row.idx for row in rows] == [0, 1, 2]
    assert rows[0].question_ids == [1, ord("Q"), ord("\n")]
    assert rows[0].steps_ids == [[ord("s"), ord("\n")], [ord("t"), ord("\n")]]
    assert rows[0].answer_ids == [*map(ord, "### A"), 0]
    assert rows[1].steps_ids == []
    assert rows[2].steps_ids == [[ord("u"), ord("\n")]]


def test_problems_tokenized_a_few_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch):
    problems = [Example(f"q{i}", [f"s{i}"] * (i % 3), f"a{i}") for i in range(8)]
    at_once = tokenize_examples(problems, LetterTokenizer())
    monkeypatch.setattr("coconut_fast.data.examples.AT_ONCE", 3)
    assert tokenize_examples(problems, LetterTokenizer()) == at_once


def test_a_tokenizer_without_end_of_text_is_refused():
    tokenizer = LetterTokenizer()
    tokenizer.eos_token_id = None
    with pytest.raises(ValueError, match="no eos_token"):
        tokenize_examples([Example("q", [], "a")], tokenizer)


def words_only(unk_token: str | None = None) -> PreTrainedTokenizerFast:
    """A user's own tokenizer, of a few words; other words are an error, or all one token."""
    known = ["<eos>", "is", "Tom", "a", "cat?", "###", "True", *filter(None, [unk_token])]
    words = {word: number for number, word in enumerate(known)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=unk_token or "none"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token=unk_token)


@pytest.mark.parametrize(
    ("wrong", "field", "word"),
    [
        (Example("is Tom a dog?", [], "True"), "question", "dog?"),
        (Example("is Tom a cat?", ["Tom is", "Tom was"], "True"), "steps", "was"),
        (Example("is Tom a cat?", ["Tom is"], "False"), "answer", "False"),
    ],
)
def test_a_word_without_a_token_is_named(monkeypatch: pytest.MonkeyPatch, wrong: Example, field: str, word: str):
    monkeypatch.setattr("coconut_fast.data.examples.AT_ONCE", 2)
    good = Example("is Tom a cat?", ["Tom is"], "True")
    message = f"train.json: record 4, field '{field}': found '{re.escape(word)}', which is none of the 7 words"
    with pytest.raises(ValueError, match=message):
        tokenize_examples([good, good, good, wrong], words_only(), "train.json")


def test_words_read_as_the_unknown_token_are_told_of():
    good, odd = Example("is Tom a cat?", ["Tom is"], "True"), Example("is Rex a cat?", ["Rex is"], "False")
    message = r"^val.json: the tokenizer does not know 3 of the words, first 'Rex' in record 2; .* as <unk>"
    with pytest.warns(UserWarning, match=message):
        tokenize_examples([good, odd], words_only("<unk>"), "val.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize_examples([good], words_only("<unk>"), "val.json")


def test_threads_that_write_one_file_write_it_whole(tmp_path: Path):
    def write(number: int) -> None:
        for _ in range(50):
            write_json(tmp_path / "one.json", [number] * 1000)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(write, range(2)))
    assert len(set(json.loads((tmp_path / "one.json").read_text()))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["one.json"]
