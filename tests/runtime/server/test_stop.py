from hypothesis import given
from hypothesis import strategies as st

from morphserve.runtime.server.stop import StopFinder

ALPHABET = "ab"  # few letters, so that stop strings often begin and often overlap


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    stop = StopFinder(["\n\nEnd"])
    assert [stop.add(piece) for piece in ("x\n", "\nE", "xit", "\n\nEn")] == [
        "x",
        "",
        "\n\nExit",
        "",
    ]
    assert not stop.found and stop.finish() == "\n\nEn"


def test_text_is_cut_before_the_stop_string() -> None:
    stop = StopFinder(["END", "ND"])
    assert stop.add("the E") == "the "
    assert stop.add("ND of") == ""
    assert stop.found and stop.finish() == ""


@given(
    st.lists(st.text(ALPHABET, max_size=4)),
    st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3),
)
def test_pieces_give_what_the_whole_text_gives(pieces: list[str], stops: list[str]) -> None:
    stop, sent = StopFinder(stops), ""
    for piece in pieces:
        sent += stop.add(piece)
        if stop.found:
            break
    sent += stop.finish()
    text = "".join(pieces)
    if not any(s in text for s in stops):
        assert sent == text and not stop.found
    else:
        assert stop.found and text.startswith(sent)
        assert not any(s in sent for s in stops)
        assert any(text.startswith(s, len(sent)) for s in stops)


def test_a_stop_string_is_part_of_the_text_if_wanted() -> None:
    finder = StopFinder(["END", "zz"], include=True)
    assert finder.add("one E") + finder.add("ND two zz") == "one END" and finder.found
