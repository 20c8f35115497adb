"""The n-gram that a GPT is measured against, beside one that is written out with dictionaries."""

import collections
import math

import pytest

from fasttx.systems._ngram import bits_per_character


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_an_n_gram_is_witten_and_bells(order):
    seen, asked = "the cat sat on the mat and the rat sat", "that cat ate the hat!"
    letters = set(seen + asked)
    follow = collections.defaultdict(collections.Counter)
    for length in range(order):
        for i in range(len(seen) - length):
            follow[seen[i : i + length]][seen[i + length]] += 1

    def chance(letter, context):
        shorter = chance(letter, context[1:]) if context else 1 / len(letters)
        n = follow.get(context)
        return (n[letter] + len(n) * shorter) / (n.total() + len(n)) if n else shorter

    places = range(order - 1, len(asked))
    for place in places:
        assert sum(chance(letter, asked[place - order + 1 : place]) for letter in letters) == pytest.approx(1)
    bits = [-math.log2(chance(asked[i], asked[i - order + 1 : i])) for i in places]
    assert bits_per_character(seen, asked, order) == pytest.approx(sum(bits) / len(bits), rel=1e-12)


def test_an_n_gram_that_does_not_fit():
    with pytest.raises(ValueError, match="lower order"):
        bits_per_character("abcdefgh" * 9, "abc", 40)
