"""A frozen teacher from a checkpoint or a transformers directory, and whose ids are refused."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.checkpoints import save_model
from moesaic.data import BPETokenizer, ByteTokenizer, DataConfig, Tokenizer
from moesaic.distillation import weights_hash
from moesaic.distillation.teachers import load_teacher, teacher_tokenizer
from moesaic.errors import InputError
from moesaic.interop import to_hf
from moesaic.models import Decoder, build_decoder, llama4_toy

TEXTS = [b"def f(x):\n    return x\n" * 20, b"a tokenizer needs some text to learn from " * 20]
BPE = BPETokenizer.train(TEXTS, 270)
OTHER_BPE = BPETokenizer.train([b"zyxwvut abab cdcd efef ghgh ijij klkl mnmn opop " * 30], 270)


def decoder(tokenizer: Tokenizer = BPE) -> Decoder:
    return build_decoder(dataclasses.replace(llama4_toy(), vocab_size=tokenizer.vocab_size))


def test_checkpoint_and_directory_are_the_same_teacher(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    teacher = decoder()
    save_model(tmp_path / "t.ckpt", teacher, BPE)
    # as moesaic convert writes it: the same tokenizer with another way back to text
    content = {**json.loads(BPE.to_dict()["json"]), "decoder": {"type": "ByteLevel"}}
    teacher.foreign_files = {"config.json": "{}", "tokenizer.json": json.dumps(content)}
    to_hf(teacher, tmp_path / "hf")
    tokens = torch.randint(BPE.vocab_size, (2, 12))
    with torch.no_grad():
        expected = teacher.eval()(tokens).logits
    for path in (tmp_path / "t.ckpt", tmp_path / "hf"):
        found = load_teacher(path, BPE, BPE.vocab_size)
        assert not found.training
        assert weights_hash(found) == weights_hash(teacher)
        with torch.no_grad():
            assert torch.equal(found(tokens).logits, expected)
        with pytest.raises(InputError, match=r"its tokenizer \(bpe\) is not that of the student's data \(bpe\)"):
            load_teacher(path, OTHER_BPE, BPE.vocab_size)
        with pytest.raises(InputError, match=r"a vocabulary of 270, the student's has 257; soft targets need the same"):
            load_teacher(path, ByteTokenizer(), 257)
    assert not caplog.records


def test_other_kinds_of_tokenizers_are_refused(tmp_path: Path) -> None:
    tokenizer = BPETokenizer.train(TEXTS, 257)
    save_model(tmp_path / "t.ckpt", decoder(tokenizer), tokenizer)
    with pytest.raises(InputError, match=r"its tokenizer \(bpe\) is not that of the student's data \(bytes\)"):
        load_teacher(tmp_path / "t.ckpt", ByteTokenizer(), 257)


def test_an_unknown_tokenizer_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_model(tmp_path / "without.ckpt", decoder())
    save_model(tmp_path / "with.ckpt", decoder(), BPE)
    with caplog.at_level(logging.WARNING):
        load_teacher(tmp_path / "without.ckpt", BPE, 270)
        load_teacher(tmp_path / "with.ckpt", None, 270)
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        "the teacher came without a tokenizer, only the vocabulary size was compared",
        "the data came without a tokenizer, only the vocabulary size was compared",
    ]


def test_which_text_is_read_with_the_teachers_tokenizer(tmp_path: Path) -> None:
    def found(checkpoint: Path, **data: Any) -> Tokenizer | None:
        return teacher_tokenizer(checkpoint, DataConfig(**{"vocab_size": 270, **data}))

    path = tmp_path / "t.ckpt"
    save_model(path, decoder(), BPE)
    taken = found(path, source="files", path="other text")
    assert taken is not None and taken.to_dict() == BPE.to_dict()
    for other in (
        {"tokenizer": "bytes"},
        {"vocab_size": 271},
        {"vocab_size": 2048},  # what the config that save_model makes up has
        {"source": "memmap", "path": "ids"},
        {"source": "induction"},
    ):
        assert found(path, **other) is None, other
    stored = torch.load(path, weights_only=True)
    stored["hyper_parameters"]["config"]["data"]["vocab_size"] = 500
    torch.save({**stored, "optimizer_states": []}, tmp_path / "run.ckpt")  # its text was too little for 500 entries
    assert found(tmp_path / "run.ckpt", vocab_size=500) is not None
    assert found(tmp_path / "run.ckpt", vocab_size=499) is None
    save_model(tmp_path / "bytes.ckpt", decoder(ByteTokenizer()), ByteTokenizer())
    save_model(tmp_path / "none.ckpt", decoder())
    assert found(tmp_path / "bytes.ckpt") is found(tmp_path / "none.ckpt") is found(tmp_path) is None
    with pytest.raises(InputError, match=r"gone.ckpt: no such file"):
        found(tmp_path / "gone.ckpt")


def test_what_is_no_teacher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"teacher='.*nowhere.ckpt': no such file or directory"):
        load_teacher(tmp_path / "nowhere.ckpt", BPE, 270)
    (tmp_path / "broken.ckpt").write_bytes(b"garbage")
    with pytest.raises(InputError, match=r"broken.ckpt: truncated or not a checkpoint"):
        load_teacher(tmp_path / "broken.ckpt", BPE, 270)
    with pytest.raises(InputError, match=r"no config.json in this directory"):
        load_teacher(tmp_path, BPE, 270)
    diverged = decoder()
    with torch.no_grad():
        diverged.head.weight[3, 0] = float("nan")
    save_model(tmp_path / "diverged.ckpt", diverged, BPE)
    with pytest.raises(InputError, match=r"diverged.ckpt: head.weight holds numbers that are not finite"):
        load_teacher(tmp_path / "diverged.ckpt", BPE, 270)
    teacher = decoder()
    teacher.foreign_files = {"config.json": "{}", "tokenizer.json": "{"}
    to_hf(teacher, tmp_path / "hf")
    with pytest.raises(InputError, match=r"hf: its tokenizer.json is damaged"):
        load_teacher(tmp_path / "hf", BPE, 270)
