"""Tokenizers for models trained from scratch: words (built from the data), and the symbols of graph problems.

Both are Hugging Face fast tokenizers: `save_pretrained` writes them, `AutoTokenizer` reads them. They know the latent
markers, and a pause token where the vocabulary is built from data.

A word is the same token wherever it stands: it includes the space before it, and the start of a text or line counts as
a space ("Tom" opening a step is the "Tom" of the question). Digits and punctuation marks are one token each; "<<", ">>"
and "###" are whole, and a newline is a token. So decoding restores the text exactly, if every word is known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from coconut_fast.data.examples import Example
from coconut_fast.data.graphs import VOCABULARY
from coconut_fast.tokens import END_LATENT, LATENT, PAUSE, START_LATENT

END_OF_TEXT, PAD, UNKNOWN = "<|endoftext|>", "<|pad|>", "<|unknown|>"
_SPACE = "\u2581"  # stands for the space before a word, as in SentencePiece
_WORDS = rf"{_SPACE}?(?:\p{{L}}+|\p{{N}}|#+|<<|>>|[^\p{{L}}\p{{N}}{_SPACE}])|{_SPACE}"


def word_tokenizer(examples: Iterable[Example]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the words in `examples`, frequent ones first; other words become <|unknown|>."""
    splitter = _splitter()
    words: Counter[str] = Counter()
    for e in tqdm(examples, desc="words", unit="problem", delay=2):
        for text in (f"{e.question}\n", *(f"{step}\n" for step in e.steps), f"### {e.answer}"):
            words.update(word for word, _ in splitter.pre_tokenize_str(text))
    if not words:
        raise ValueError("examples: found no text, expected at least one problem")
    special = [END_OF_TEXT, PAD, UNKNOWN, START_LATENT, END_LATENT, LATENT, PAUSE]
    ordered = sorted(words, key=lambda word: (-words[word], word))
    ids = {token: number for number, token in enumerate([*special, *ordered])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Fuse(),
            decoders.Replace(f"{_SPACE}\n", "\n"),
            decoders.Replace(f"\n{_SPACE}", "\n"),
            decoders.Replace(_SPACE, " "),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _wrapped(tokenizer, special, eos_token=END_OF_TEXT, pad_token=PAD, unk_token=UNKNOWN)


def symbolic_tokenizer() -> PreTrainedTokenizerFast:
    """The 40 symbols of graph problems, separated by spaces; the tokenizer raises an error for any other."""
    ids = {token: number for number, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="none"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [START_LATENT, END_LATENT, LATENT, "<eos>"]
    return _wrapped(tokenizer, special, bos_token="<eos>", eos_token="<eos>", pad_token="<eos>")


def _splitter() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always", split=False),
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
        ]
    )


def _wrapped(tokenizer: Tokenizer, special: list[str], **names: str) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    others = [token for token in special if token not in names.values()]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=others, clean_up_tokenization_spaces=False, **names
    )
