"""Problems of a data set as token ids: text through the tokenizer, or graphs as symbols, shuffled each epoch."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from coconut_fast.data.examples import Example, TokenizedExample, read_examples, tokenize_examples
from coconut_fast.data.graphs import NUM_NODES, Graph, graph_of, symbolic_example, symbolic_examples


class DataSet:
    """A data set. `fixed` holds every problem as tokenized for epoch 0; `at` gives one as an epoch sees it.

    symbols: None for text; for graph problems, how they are written (keywords of data.graphs.symbolic_examples).
    where: the file the problems are from, for errors.
    ValueError where there is no tokenizer for text, or no graph for symbols.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: Any,
        symbols: Mapping[str, Any] | None = None,
        seed: int = 0,
        where: str = "the data",
    ) -> None:
        self.examples = examples
        self.symbols = symbols
        self.seed = seed
        self.where = where
        self.graphs: list[Graph] = []
        if symbols is not None:
            self.graphs = graphs_of(examples, where)
            self.fixed = symbolic_examples(self.graphs, seed=seed, **symbols)
        elif tokenizer is None:
            raise ValueError("tokenizer: the model has none, expected one to read questions with")
        else:
            self.fixed = tokenize_examples(examples, tokenizer, where)

    def __len__(self) -> int:
        return len(self.examples)

    def at(self, idx: int, epoch: int) -> TokenizedExample:
        """One problem; text is the same in every epoch."""
        if self.symbols is None:
            return self.fixed[idx]
        return symbolic_example(self.graphs[idx], idx, seed=self.seed, epoch=epoch, **self.symbols)

    @cached_property
    def digest(self) -> str:
        """A hash of these problems, in this order and as this tokenizer encodes them."""
        found = hashlib.blake2b(digest_size=8)
        for example in self.fixed:
            for ids in (example.question_ids, *example.steps_ids, example.answer_ids):
                found.update(array("q", [len(ids), *ids]))
        return found.hexdigest()


def graphs_of(examples: Sequence[Example], where: str) -> list[Graph]:
    """The graphs of problems; ValueError, naming `where` and the record, for none, or one too large for the symbols."""
    graphs = [graph_of(example, f"{where}: record {number}") for number, example in enumerate(examples, 1)]
    for number, graph in enumerate(graphs, 1):
        if graph.num_nodes > NUM_NODES:
            raise ValueError(
                f"{where}: record {number}: found {graph.num_nodes} nodes, expected at most the {NUM_NODES} that have "
                "a symbol"
            )
    return graphs


def read_file(path: str | os.PathLike[str] | None, name: str, limit: int | None = None) -> list[Example]:
    """The first `limit` problems of a file; `name` is the setting that names it."""
    if path is None:
        raise ValueError(f"{name}: found none, expected a file of problems")
    return read_examples(path)[:limit]
