"""Tokenizers: lossless, complete, self-contained."""

import json
import random
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.data import BPETokenizer, ByteTokenizer, Tokenizer, tokenizer_from_dict
from moesaic.errors import InputError

TEXTS = [b"def f(x):\n    return x + 1\n" * 20, "größer als π\n".encode() * 20, b"import os, sys\n" * 30]
BPE = BPETokenizer.train(TEXTS, 300)
TOKENIZERS = [ByteTokenizer(), BPE]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["bytes", "bpe"])
@given(text=st.one_of(st.text(), st.just("a <|endoftext|> b<|endoftext|>"), st.just("\r\n\t\x00\x7f")))
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text.encode())
    assert ids.ndim == 1
    assert tokenizer.decode(ids.tolist()) == text.encode()
    assert tokenizer.end_of_text not in ids.tolist(), "only the stream puts markers between documents"


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["bytes", "bpe"])
def test_rebuilt_from_plain_json(tokenizer: Tokenizer) -> None:
    again = tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert (again.vocab_size, again.end_of_text) == (tokenizer.vocab_size, tokenizer.end_of_text)
    np.testing.assert_array_equal(again.encode(TEXTS[1]), tokenizer.encode(TEXTS[1]))


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["bytes", "bpe"])
def test_every_id_decodes_and_others_are_refused(tokenizer: Tokenizer) -> None:
    decoded = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    assert decoded[tokenizer.end_of_text] == b""
    assert {bytes([b]) for b in range(256)} <= set(decoded), "any byte can be written"
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(
            InputError, match=rf"token id {wrong}: the vocabulary has ids 0 to {tokenizer.vocab_size - 1}"
        ):
            tokenizer.decode([0, wrong])


def test_bpe_compresses_and_is_deterministic() -> None:
    assert len(BPE.encode(TEXTS[0])) < 0.5 * len(TEXTS[0])
    assert BPE.vocab_size <= 300
    assert BPETokenizer.train(TEXTS, 300).to_dict() == BPE.to_dict()


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(InputError, match=r"tokenizer of kind 'words': must be one of bytes, bpe"):
        tokenizer_from_dict({"kind": "words"})


@pytest.mark.slow
def test_a_word_without_end_takes_no_time_without_end() -> None:
    draw = random.Random(0)
    dna = "".join(draw.choices("ACGT", k=400_000)).encode()
    began = time.process_time()
    tokenizer = BPETokenizer.train([dna], 512)
    assert tokenizer.decode(tokenizer.encode(dna)) == dna
    assert time.process_time() - began < 20


def test_words_are_cut_beyond_ten_thousand_bytes_only() -> None:
    text = ("def f(x):\n    return x\n" * 50 + "a" * 10_000 + " " + "é" * 5_000 + "\n").encode()
    trained = BPETokenizer.train([text], 300)
    assert trained.to_dict() == trained_without_cuts(text, 300)


def trained_without_cuts(text: bytes, vocab_size: int) -> dict[str, Any]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([text.decode()], trainer)
    return {"kind": "bpe", "json": inner.to_str()}
