"""Ends of sequences: tokens, strings, lengths; what is cut; what streaming may show."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.sampling import TableDecoder, make_request

from lamella_executor.sampler import NewToken, StopChecker, streamable_length, streamable_tokens
from lamella_executor.sequence import Logprob, RequestState, Sequence

TABLE = {0: "a", 1: "b", 2: "ab", 3: " ", 4: "<half>", 5: "é", 6: "", 7: "abcab", 8: "c", 9: "\n\nUser"}
END = 20
STOP = 21


def feed(request: RequestState, tokens: list[int]) -> Sequence:
    """Appends tokens until the sequence ends."""
    [sequence] = request.sequences
    for token in tokens:
        if sequence.finish_reason is not None:
            break
        StopChecker().append(sequence, request, NewToken(0, token, -1.0, {token: Logprob(-1.0, 1)}))
    return sequence


def request_with(**options: Any) -> RequestState:
    table = {**TABLE, END: "</s>", STOP: "<stop>"}
    options = {"max_tokens": 12, "logprobs": 0, "end_id": END, "decoder": TableDecoder(table), **options}
    return make_request([1, 2, 3], **options)


def outcome(sequence: Sequence) -> tuple[list[int], str, str | None, int | str | None]:
    assert len(sequence.logprobs) == sequence.num_output_tokens
    return sequence.output_ids, sequence.text, sequence.finish_reason, sequence.stop_reason


@pytest.mark.parametrize(
    ("options", "tokens", "expected"),
    [
        ({}, [0, 1], ([0, 1], "ab", None, None)),
        ({}, [0, END], ([0], "a", "stop", None)),
        ({"include_stop_str_in_output": True}, [0, END], ([0], "a", "stop", None)),
        ({"extra_end_ids": (1,)}, [0, 1], ([0], "a", "stop", None)),
        ({"end_id": None}, [0, END, 1], ([0, END, 1], "a</s>b", None, None)),
        ({"stop_token_ids": [STOP]}, [0, STOP], ([0], "a", "stop", STOP)),
        (
            {"stop_token_ids": [STOP], "include_stop_str_in_output": True},
            [0, STOP],
            ([0, STOP], "a<stop>", "stop", STOP),
        ),
        ({"max_tokens": 2}, [0, 1], ([0, 1], "ab", "length", None)),
        ({"max_tokens": 2}, [0, END], ([0], "a", "stop", None)),
        ({"max_tokens": 2}, [0, 4], ([0, 4], "a\ufffd", "length", None)),
        ({"max_tokens": 2, "stop": "b"}, [0, 1], ([0], "a", "stop", "b")),
        ({"max_tokens": 2, "stop": "\ufffd"}, [0, 4], ([0], "a", "stop", "\ufffd")),
        ({"stop": ["ba", "b"]}, [0, 2], ([0], "aa", "stop", "b")),
        ({"stop": "ba"}, [0, 1, 0, 1], ([0], "a", "stop", "ba")),
        ({"stop": "ba", "include_stop_str_in_output": True}, [0, 1, 0], ([0, 1, 0], "aba", "stop", "ba")),
        ({"stop": "ca"}, [0, 7], ([0], "aab", "stop", "ca")),
        ({"stop": ["c", "bc", "abc"]}, [3, 7], ([3], " ", "stop", "abc")),
        ({"stop": ["cab", "bc"]}, [3, 7], ([3], " a", "stop", "bc")),
        ({"stop": "a"}, [0], ([], "", "stop", "a")),
        ({"stop": "\n\nUser"}, [3, 9], ([3], " ", "stop", "\n\nUser")),
        ({"stop": "é"}, [0, 4, 5], ([0], "a", "stop", "é")),
        ({"stop": "b"}, [6, 0, 6, 1], ([6, 0], "a", "stop", "b")),
    ],
)
def test_ends(options: dict[str, Any], tokens: list[int], expected: Any) -> None:
    assert outcome(feed(request_with(**options), tokens)) == expected


def test_an_end_token_is_never_decoded_but_counts_in_the_sum() -> None:
    sequence = feed(request_with(), [0, END])
    assert isinstance(sequence.decoder, TableDecoder)
    assert sequence.decoder.pushed == [0]
    assert sequence.cumulative_logprob == -2.0


def test_half_characters_are_flushed_at_the_end() -> None:
    assert outcome(feed(request_with(), [0, 4, END])) == ([0, 4], "a\ufffd", "stop", None)


def test_cut_tokens_are_no_longer_computed() -> None:
    request = request_with(stop="bab")
    [sequence] = request.sequences
    for token in (0, 1, 0, 1):
        sequence.num_computed_tokens = sequence.num_tokens
        StopChecker().append(sequence, request, NewToken(0, token))
    assert sequence.output_ids == [0]
    assert sequence.num_computed_tokens == sequence.num_tokens == 4


def test_nothing_ends_before_min_tokens() -> None:
    options = {"stop": ["b", "ab"], "stop_token_ids": [STOP], "min_tokens": 3, "max_tokens": 9}
    assert outcome(feed(request_with(**options), [1, END, STOP, 0, 1]))[:1] == ([1, END, STOP],)
    assert outcome(feed(request_with(**options), [1, 0, 6, 1])) == ([1, 0, 6], "ba", "stop", "b")
    assert outcome(feed(request_with(**options), [0, 0, 0, 8, 1])) == ([0, 0, 0, 8], "aaac", "stop", "b")
    assert outcome(feed(request_with(**options), [0, 0, 0, END])) == ([0, 0, 0], "aaa", "stop", None)


def test_works_without_a_decoder() -> None:
    sequence = feed(request_with(decoder=None), [0, 1, END])
    assert outcome(sequence) == ([0, 1], "", "stop", None)
    request = request_with(decoder=None)
    sequence = feed(request, [0, 1])
    assert (streamable_length(sequence, request), streamable_tokens(sequence, request)) == (0, 2)


def test_forks_stop_on_their_own() -> None:
    request = request_with(stop="bb")
    parent = feed(request, [0, 1])
    child = parent.fork(1)
    StopChecker().append(parent, request, NewToken(0, 1))
    StopChecker().append(child, request, NewToken(0, 0))
    assert (parent.text, parent.stop_reason) == ("a", "bb")
    assert (child.text, child.stop_reason, child.text_ends) == ("aba", None, [1, 2, 3])


def test_what_may_be_a_stop_string_is_held_back() -> None:
    request = request_with(stop=["\n\nUser", "abc"])
    shown = []
    for token in (3, 0, 1, 0, 2, 1):
        sequence = feed(request, [token])
        shown.append(sequence.text[: streamable_length(sequence, request)])
    assert shown == [" ", " ", " ", " ab", " aba", " abaabb"]


words = st.text(alphabet="ab\u00e9", min_size=1, max_size=5)


@given(
    pieces=st.lists(st.sampled_from(["", "a", "b", "ab", "ba", "aab", "é", "<half>"]), min_size=1, max_size=25),
    stops=st.lists(words, max_size=4),
    least=st.integers(0, 6),
    include=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_streaming_and_ends_against_a_plain_search(
    pieces: list[str], stops: list[str], least: int, include: bool
) -> None:
    """Against a search of the whole text after each token; what was streamed is always a prefix of the outcome."""
    table = dict(enumerate(pieces))
    request = make_request(
        [9],
        stop=stops,
        min_tokens=least,
        max_tokens=100,
        include_stop_str_in_output=include,
        decoder=TableDecoder(table),
    )
    [sequence] = request.sequences
    texts, tokens = [""], [0]
    plain = TableDecoder(table)
    protected = 0
    for i in range(len(pieces)):
        plain.push(i)
        protected = len(plain.text) if i < least else protected
        StopChecker().append(sequence, request, NewToken(0, i))
        matches = [(plain.text.find(s, protected) + len(s), plain.text.find(s, protected), s) for s in stops]
        matches = [match for match in matches if match[1] >= 0 and i >= least]
        if matches:
            end, start, stop = min(matches)
            assert (sequence.finish_reason, sequence.stop_reason) == ("stop", stop)
            assert sequence.text == plain.text[: end if include else start]
            break
        assert sequence.finish_reason is None
        length = streamable_length(sequence, request)
        assert length >= len(sequence.text) - max(map(len, stops), default=1) + 1
        texts.append(sequence.text[:length])
        tokens.append(streamable_tokens(sequence, request))
    assert all(later.startswith(earlier) for earlier, later in zip(texts, [*texts[1:], sequence.text]))
    assert tokens == sorted(tokens)
    assert tokens[-1] <= sequence.num_output_tokens
    assert sequence.num_output_tokens >= min(least, i + 1)
    kept = TableDecoder(table)
    for token in sequence.output_ids:
        kept.push(token)
    assert include or sequence.text.startswith(kept.text) or sequence.num_output_tokens == least


def test_search_is_linear_in_the_text() -> None:
    """Each token looks at no more of the text than the longest stop string and the token's own text."""

    class Counting(str):
        searched = 0

        def find(self, *arguments: Any) -> int:
            start, end = arguments[1], arguments[2] if len(arguments) > 2 else len(self)
            Counting.searched += max(0, end - start)
            return str.find(self, *arguments)

    class CountingDecoder(TableDecoder):
        def push(self, token_id: int) -> None:
            super().push(token_id)
            self.text = Counting(self.text)

    totals = []
    for length in (500, 1000):
        Counting.searched = 0
        request = make_request([1], stop=["abab" * 8], max_tokens=length, decoder=CountingDecoder(TABLE))
        feed(request, random.Random(0).choices([0, 1, 8], k=length))
        totals.append(Counting.searched)
    assert 0 < totals[1] <= 2.2 * totals[0]
