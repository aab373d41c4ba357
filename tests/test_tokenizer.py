"""Tokenizers for models trained from scratch: texts come back to the letter, before and after saving."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from coconut_fast.data.examples import Example, TokenizedExample, tokenize_examples
from coconut_fast.data.graphs import TOKENS, VOCABULARY, layered_trees, symbolic_examples, symbolic_record
from coconut_fast.data.prontoqa import generate_prontoqa
from coconut_fast.data.prosqa import generate_prosqa
from coconut_fast.data.tokenizer import symbolic_tokenizer, word_tokenizer
from coconut_fast.tokens import END_LATENT, LATENT, PAUSE, START_LATENT
from coconut_fast.train.problems import DataSet

GSM = [
    Example(
        "Josh buys a house for $80,000.  It's 150% up (really!); who\u2019s “rich” \u2013 Ünal?\tNobody…",
        ["<<80000+50000=130000>>", "", "<<2*.5=1>>"],
        "-1,070.5",
    ),
    Example("is it so , or not ? it 's n't .", ["do n't , please !"], "no ."),
]


def whole(example: Example) -> str:
    return "".join(f"{line}\n" for line in [example.question, *example.steps]) + f"### {example.answer}"


@pytest.mark.parametrize(
    "examples", [generate_prosqa(60), generate_prontoqa(60), GSM], ids=["prosqa", "prontoqa", "gsm8k"]
)
def test_texts_come_back_to_the_letter(examples):
    tokenizer = word_tokenizer(examples)
    for example in examples:
        tokenized = tokenize_examples([example], tokenizer)[0]
        ids = [i for piece in [tokenized.question_ids, *tokenized.steps_ids, tokenized.answer_ids] for i in piece]
        assert tokenizer.unk_token_id not in ids
        assert ids.pop() == tokenizer.eos_token_id
        assert tokenizer.decode(ids) == whole(example)
        # pieces and the whole are the same tokens
        assert tokenizer(whole(example))["input_ids"] == ids
        assert tokenizer.decode(tokenized.answer_ids, skip_special_tokens=True) == f"### {example.answer}"


def test_a_word_is_one_token_wherever_it_stands():
    tokenizer = word_tokenizer(generate_prosqa(200))
    assert len(tokenizer) == 7 + 17 + 38 + 9  # special, entities, concepts, and: Every is a Is or . ? ### newline
    name = tokenizer.encode("Tom")
    assert len(name) == 1
    for text in ("Tom is a lempus.", "Every lempus is a wumpus. Tom is a lempus.", "lempus.\nTom", "### Tom"):
        assert tokenizer.encode(text).count(name[0]) == 1
    assert len(tokenizer.encode("### Tom is a lempus.\n")) == 7
    assert tokenizer.decode(tokenizer.encode("Tom is a zebra.")) == "Tom is a<|unknown|>."


def test_vocabulary_is_the_same_for_the_same_data():
    examples = generate_prosqa(30)
    assert word_tokenizer(examples).get_vocab() == word_tokenizer(examples[::-1]).get_vocab()
    with pytest.raises(ValueError, match="found no text"):
        word_tokenizer([])


def test_word_tokenizer_survives_saving(tmp_path):
    tokenizer = word_tokenizer(generate_prosqa(60))
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.is_fast and again.get_vocab() == tokenizer.get_vocab()
    assert [again.eos_token, again.pad_token, again.unk_token] == ["<|endoftext|>", "<|pad|>", "<|unknown|>"]
    text = f"Is Tom a lempus or wumpus?\n{START_LATENT}{LATENT}{LATENT}{END_LATENT}### Tom is a lempus."
    ids = again.encode(text)
    assert ids == tokenizer.encode(text)
    start, thought, end, pause = again.convert_tokens_to_ids([START_LATENT, LATENT, END_LATENT, PAUSE])
    at = ids.index(start)
    assert ids[at : at + 4] == [start, thought, thought, end]
    assert len({start, thought, end, pause, again.unk_token_id, again.eos_token_id, again.pad_token_id}) == 7
    assert again.decode(ids, skip_special_tokens=True).endswith("### Tom is a lempus.")


def test_symbolic_tokenizer(tmp_path):
    symbolic_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.get_vocab() == {token: number for number, token in enumerate(VOCABULARY)}
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == tokenizer.bos_token_id == TOKENS.eos
    graph = layered_trees(1)[0]
    record = symbolic_record(graph)
    ids = tokenizer.encode(record.question)
    assert tokenizer.decode(ids) == record.question
    assert sorted(ids) == sorted(symbolic_examples([graph])[0].question_ids)
    assert tokenizer.encode(f"[R] 3{LATENT}{LATENT} [A]") == [36, 3, TOKENS.thought, TOKENS.thought, 37]
    assert tokenizer.decode([graph.target, TOKENS.eos], skip_special_tokens=True) == record.answer
    with pytest.raises(Exception, match="WordLevel"):
        tokenizer.encode("31")


def test_a_digest_knows_where_pieces_end():
    """The problems of a run that is resumed are recognised by it."""

    def digest(question: list[int], step: list[int], answer: list[int]) -> str:
        data = DataSet([], None, symbols={})
        data.fixed = [TokenizedExample(question, [step], answer)]
        return data.digest

    assert len({digest([1, 2], [3], [4]), digest([1], [2, 3], [4]), digest([1, 2], [], [3, 4])}) == 3
