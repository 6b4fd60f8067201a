import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from morphserve.configs.errors import UnsupportedModel
from morphserve.runtime.tokenizer import (
    ByteDetokenizer,
    PromptTooLong,
    TemplateError,
    Tokenizer,
    WindowDetokenizer,
)

DEMO_MODEL = Path(str(resources.files("morphserve.morphcli").joinpath("demo_model")))
DEMO = Tokenizer(DEMO_MODEL)


def write_model(folder: Path, tokenizer: tokenizers.Tokenizer, **config: object) -> Tokenizer:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(folder)


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Llama 2's kind: spaces become ▁, unknown characters single bytes, the first space goes."""
    pieces = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "a", "b", "é"]
    model = models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=[("▁", "a")],
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return write_model(tmp_path_factory.mktemp("sentencepiece"), tokenizer)


def pieces_of(tokenizer: Tokenizer, tokens: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    detokenizer = tokenizer.detokenizer(prompt)
    return [*(detokenizer.add([token]) for token in tokens), detokenizer.finish()]


def assert_whole(tokenizer: Tokenizer, tokens: Sequence[int]) -> None:
    pieces = pieces_of(tokenizer, tokens)
    full = tokenizer.decode(tokens)
    assert "".join(pieces) == full
    assert sum(piece.count("\ufffd") for piece in pieces) == full.count("\ufffd")


@given(st.text())
def test_pieces_of_a_byte_level_text_join_to_the_text(text: str) -> None:
    tokens = DEMO.encode(text, 10_000)
    assert isinstance(DEMO.detokenizer([]), ByteDetokenizer)
    assert "".join(pieces_of(DEMO, tokens)) == text
    assert_whole(DEMO, tokens)


@given(st.lists(st.integers(0, DEMO.num_ids - 1)))
def test_pieces_of_any_byte_level_tokens_join_to_the_full_decode(tokens: list[int]) -> None:
    assert_whole(DEMO, tokens)


@given(text=st.text())
def test_pieces_of_a_sentencepiece_text_join_to_the_full_decode(
    sentencepiece: Tokenizer, text: str
) -> None:
    assert isinstance(sentencepiece.detokenizer([]), WindowDetokenizer)
    assert_whole(sentencepiece, sentencepiece.encode(text, 10_000))


@given(prompt=st.text(st.sampled_from(" ab\n"), min_size=1), text=st.text())
def test_prompt_and_completion_join_to_the_decode_of_both(
    sentencepiece: Tokenizer, prompt: str, text: str
) -> None:
    asked = sentencepiece.encode(prompt, 1000)
    answered = sentencepiece.encode(text, 10_000)
    completion = "".join(pieces_of(sentencepiece, answered, asked))
    assert sentencepiece.decode(asked) + completion == sentencepiece.decode([*asked, *answered])


def test_a_completion_keeps_its_first_space(sentencepiece: Tokenizer) -> None:
    asked, answered = sentencepiece.encode("b b", 10), sentencepiece.encode("a", 10)
    assert "".join(pieces_of(sentencepiece, answered, asked)) == " a"


def test_other_threads_run_while_a_long_text_is_encoded() -> None:
    text = "import os, re  # 123\n" * 20_000
    with ThreadPoolExecutor(1) as executor:
        started = latest = time.monotonic()
        encoding = executor.submit(DEMO.encode, text, len(text))
        longest = 0.0
        while not encoding.done():
            time.sleep(0.001)
            now = time.monotonic()
            longest, latest = max(longest, now - latest), now
    assert longest < 0.5 * (latest - started)


def test_a_character_of_several_tokens_comes_out_once_and_whole(sentencepiece: Tokenizer) -> None:
    for tokenizer in (DEMO, sentencepiece):
        pieces = pieces_of(tokenizer, tokenizer.encode("a 🦉!", 100))
        assert "".join(pieces) == "a 🦉!"
        assert [piece for piece in pieces if "🦉" in piece] == ["🦉"]


def test_special_tokens_are_silent() -> None:
    assert "".join(pieces_of(DEMO, [0, *DEMO.encode("import", 10), 0])) == "import"


def test_an_added_token_that_is_not_special_reads_as_it_is_written(tmp_path: Path) -> None:
    plain = tokenizers.Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    plain.add_tokens(["<think> naïve"])
    tokenizer = write_model(tmp_path, plain)
    assert "".join(pieces_of(tokenizer, [tokenizer.num_ids - 1])) == "<think> naïve"


def test_a_text_that_can_never_fit_is_refused_before_the_work() -> None:
    with pytest.raises(PromptTooLong, match="at least 22223 tokens, this server takes at most 10"):
        DEMO.encode("x" * 1_000_000, 10)


def test_without_a_template_a_chat_is_lines_of_role_and_content() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    text = DEMO.decode(DEMO.encode_chat(messages, 100))
    assert text == "user: hi\nassistant: yes\nassistant:"


TEMPLATE = (
    "{% for m in messages %}\n"
    "    {% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}\n"
    "{% generation %}[{{ m.role }}]{{ m.content | tojson }}{% endgeneration %}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ eos_token }}>{% endif %}"
)


@pytest.mark.parametrize("template", [TEMPLATE, [{"name": "default", "template": TEMPLATE}]])
def test_a_chat_template_is_rendered_in_a_sandbox(tmp_path: Path, template: object) -> None:
    plain = tokenizers.Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    tokenizer = write_model(
        tmp_path, plain, chat_template=template, eos_token={"content": "<|endoftext|>"}
    )
    tokens = tokenizer.encode_chat([{"role": "user", "content": "hé"}], 100)
    assert tokenizer.decode(tokens) == '[user]"hé">' and 0 in tokens
    with pytest.raises(TemplateError, match="no tools"):
        tokenizer.encode_chat([{"role": "tool", "content": ""}], 100)


@pytest.mark.parametrize("fault", ["{{ 1 / 0 }}", "{{ messages[0].content.x.y }}", "{{ [][3].a }}"])
def test_whatever_a_template_raises_is_one_sentence(tmp_path: Path, fault: str) -> None:
    plain = tokenizers.Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    tokenizer = write_model(tmp_path, plain, chat_template=fault)
    with pytest.raises(TemplateError, match="chat template refuses this"):
        tokenizer.encode_chat([{"role": "user", "content": "hi"}], 100)


@pytest.mark.parametrize("template", [7, {"default": "x"}, [{"name": "default", "template": 1}]])
def test_a_template_that_is_no_text_is_refused_at_start(tmp_path: Path, template: object) -> None:
    plain = tokenizers.Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    with pytest.raises(UnsupportedModel, match="chat_template in .* must be a text"):
        write_model(tmp_path, plain, chat_template=template)


def test_a_template_cannot_reach_python(tmp_path: Path) -> None:
    plain = tokenizers.Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    tokenizer = write_model(tmp_path, plain)
    with pytest.raises(TemplateError, match="unsafe"):
        tokenizer.encode_chat([{"role": "user", "content": "hi"}], 100)


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="no model folder"):
        Tokenizer(tmp_path / "absent")
    with pytest.raises(UnsupportedModel, match=r"no tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match="cannot be read"):
        Tokenizer(tmp_path)
    plain = tokenizers.Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    with pytest.raises(UnsupportedModel, match="does not compile"):
        write_model(tmp_path, plain, chat_template="{% if %}")
