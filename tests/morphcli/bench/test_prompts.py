"""Prompts have exactly the tokens asked for, as the server will count them."""

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import Whitespace

from morphserve.configs.errors import ConfigError
from morphserve.morphcli.bench.prompts import (
    PromptError,
    load_corpus,
    load_tokenizer,
    make_prompts,
)
from morphserve.morphcli.bench.quality import open_quality

DEMO = Path(__file__).parents[3] / "morphcli" / "demo_model"


def test_prompts_are_text_of_exactly_n_tokens_and_differ() -> None:
    tokenizer, corpus = load_tokenizer(DEMO), load_corpus(DEMO, None)
    lengths = [1, 2, 3, 17, 17, 256, 1000, *random.Random(0).choices(range(1, 600), k=50)]
    prompts = make_prompts(tokenizer, corpus, lengths, seed=3)
    for prompt, length in zip(prompts.prompts, lengths, strict=True):
        assert isinstance(prompt, str)
        assert len(tokenizer.encode(prompt).ids) == length
    assert prompts.num_token_ids == 0
    longer = [p for p, n in zip(prompts.prompts, lengths, strict=True) if n > 3]
    assert len(set(map(str, longer))) == len(longer)


def test_equal_seeds_give_equal_prompts() -> None:
    tokenizer, corpus = load_tokenizer(DEMO), load_corpus(DEMO, None)
    made = [make_prompts(tokenizer, corpus, [20, 30], seed=seed) for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2]


def test_unreachable_lengths_are_sent_as_token_ids_and_counted() -> None:
    tokenizer = Tokenizer(WordLevel({"a": 0, "?": 1}, unk_token="?"))
    tokenizer.normalizer = Replace("a", "a a")  # any text has an even number of tokens
    tokenizer.pre_tokenizer = Whitespace()
    prompts = make_prompts(tokenizer, "a " * 40, [5, 7], seed=0)
    assert prompts.prompts == ([0] * 5, [0] * 7)
    assert prompts.num_token_ids == 2


def test_too_short_a_text_is_refused_with_the_numbers() -> None:
    tokenizer = load_tokenizer(DEMO)
    with pytest.raises(PromptError, match="the longest prompt needs 50"):
        make_prompts(tokenizer, "import os", [50], seed=0)


def test_a_folder_without_text_or_tokenizer_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="give --prompts FILE"):
        load_corpus(tmp_path, None)
    with pytest.raises(PromptError, match="cannot read prompts"):
        load_corpus(tmp_path, tmp_path / "none.txt")
    with pytest.raises(PromptError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(PromptError, match="cannot be read as a tokenizer"):
        load_tokenizer(tmp_path)


def test_too_short_a_text_for_perplexity_names_the_option(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("import os\n" * 100)
    with pytest.raises(ConfigError, match="give a longer --prompts FILE"):
        open_quality(str(DEMO), None, tmp_path / "short.txt")
