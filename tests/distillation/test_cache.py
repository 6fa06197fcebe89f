"""The cache on disk: what goes in comes out, what does not fit is refused by name, what was listed survives."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moesaic.data.loaders import Batch, windows_at
from moesaic.distillation import (
    CachedTargets,
    CacheIdentity,
    CacheThrough,
    FrozenTeacher,
    TargetCache,
    TargetFormat,
    forecast,
    stream_keys,
    weights_hash,
    window_keys,
)
from moesaic.errors import InputError
from moesaic.losses.targets import DenseTargets, SampledTargets, TopKTargets
from moesaic.models import Decoder, MoEConfig, build_decoder, llama4_toy

V, L, WINDOWS = 40, 16, 12
STREAM = np.random.default_rng(0).integers(V, size=L * WINDOWS + 5).astype(np.uint16)
FORMS = {
    "top_k": TargetFormat("top_k", k=6),
    "sampled": TargetFormat("sampled", num_samples=12, exponent=0.8),
    "dense": TargetFormat("dense"),
}
every_kind = pytest.mark.parametrize("kind", FORMS)


@pytest.fixture
def decoder() -> Decoder:
    toy = llama4_toy(moe=MoEConfig(num_experts=4, hidden_dim=32, expert_bias=True))
    decoder = build_decoder(dataclasses.replace(toy, vocab_size=V))
    with torch.no_grad():
        for name, buffer in decoder.named_buffers():
            if name.endswith("expert_bias"):
                buffer += torch.linspace(-0.1, 0.1, len(buffer))
        decoder.head.weight *= 3  # peaked enough that few ids hold most of the mass
    return decoder


def identity(decoder: Decoder, kind: str = "top_k", **changes: Any) -> CacheIdentity:
    same = CacheIdentity(weights_hash(decoder), "t" * 64, L, V, FORMS[kind], seed=5)
    return dataclasses.replace(same, **changes)


def batch(*windows: int) -> Batch:
    return windows_at(STREAM, np.array(windows) * L, L)


def filled(directory: Path, decoder: Decoder, of: CacheIdentity, windows_per_shard: int = 4) -> TargetCache:
    """A complete cache, made batch by batch."""
    cache = TargetCache.create(directory, of, windows_per_shard)
    through = CacheThrough(cache, FrozenTeacher(decoder), of)
    try:
        for first in range(0, WINDOWS, 2):
            through.fill(batch(first, first + 1))
        cache.close()
    finally:
        cache.release()
    return TargetCache.open(directory, of.settings())


def logits_of(decoder: Decoder, of: Batch) -> Tensor:
    with torch.no_grad():
        return decoder.eval()(of["tokens"]).logits.flatten(0, 1)


def read(cache: TargetCache, of: Batch) -> Any:
    return cache.targets(of["tokens"], of["labels"])


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


# ---- round trip


def test_cached_top_v_equals_the_teacher(decoder: Decoder, tmp_path: Path) -> None:
    cache = filled(tmp_path / "cache", decoder, identity(decoder, form=TargetFormat("top_k", k=V, temperature=1.5)))
    wanted = batch(7, 0, 11)
    found = read(cache, wanted)
    assert isinstance(found, TopKTargets)
    assert found.temperature == 1.5
    logits = logits_of(decoder, wanted)
    log_p = (logits / 1.5).log_softmax(dim=-1)
    online = torch.full_like(log_p, torch.nan).scatter_(1, found.ids, found.log_probs)
    torch.testing.assert_close(online, log_p, rtol=2**-10, atol=2**-10)
    assert float(found.log_probs.logsumexp(dim=-1).max()) < 1e-6, "no more mass than one, or the tail is negative"
    teacher = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(found.entropy, teacher.entropy(), rtol=2**-10, atol=2**-10)
    expected = teacher.log_prob(wanted["labels"].flatten())
    torch.testing.assert_close(found.label_log_prob, expected, rtol=2**-10, atol=2**-10)
    assert {x.dtype for x in (found.log_probs, found.entropy, found.label_log_prob)} == {torch.float32}
    assert found.ids.dtype == torch.int64


def test_cached_logits_equal_the_teachers(decoder: Decoder, tmp_path: Path) -> None:
    cache = filled(tmp_path / "cache", decoder, identity(decoder, "dense"))
    found = read(cache, batch(3, 4))
    assert isinstance(found, DenseTargets)
    logits = logits_of(decoder, batch(3, 4))
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    torch.testing.assert_close(found.logits, shifted, rtol=2**-10, atol=2**-10)


def test_cached_samples_are_those_of_the_windows_own_seed(decoder: Decoder, tmp_path: Path) -> None:
    of = identity(decoder, "sampled")
    cache = filled(tmp_path / "cache", decoder, of)
    found = read(cache, batch(9, 2))
    assert isinstance(found, SampledTargets)
    assert found.ids.shape == found.weights.shape
    alone = read(cache, batch(2))
    width = alone.ids.size(1)
    assert torch.equal(found.ids[L:, :width], alone.ids)
    assert not found.weights[L:, width:].any()
    kept = (found.weights > 0).sum(dim=1)
    assert 1 < int(kept.float().mean()) < 12
    mean = found.weights.sum(dim=1).mean()
    assert float(mean) == pytest.approx(1, abs=0.15)
    other = filled(tmp_path / "other", decoder, dataclasses.replace(of, seed=6))
    assert not torch.equal(read(other, batch(2)).weights, alone.weights)


def test_ids_beyond_two_bytes(tmp_path: Path) -> None:
    of = CacheIdentity("t", None, L, 200_000, TargetFormat("top_k", k=2))
    tokens, labels = torch.arange(L)[None] + 150_000, torch.arange(1, L + 1)[None] + 150_000
    ids = torch.stack([torch.arange(L) + 199_000, torch.arange(L)], dim=1)
    half = torch.full((L, 2), 0.5).log()
    cache = TargetCache.create(tmp_path / "cache", of)
    cache.add(tokens, labels, TopKTargets(ids, half, 1.0, torch.zeros(L), torch.full((L,), -torch.inf)))
    cache.close()
    found = read(TargetCache.open(tmp_path / "cache"), {"tokens": tokens, "labels": labels})
    assert torch.equal(found.ids, ids)
    assert bool(found.label_log_prob.isfinite().all()), "what fp16 cannot hold is as large as it can"
    assert json.loads((tmp_path / "cache" / "manifest.json").read_text())["dtypes"]["ids"] == "uint32"


def test_ignored_labels_have_no_log_probability(decoder: Decoder, tmp_path: Path) -> None:
    of = identity(decoder)
    cache = TargetCache.create(tmp_path / "cache", of)
    wanted = batch(1)
    wanted["labels"][0, 3] = -100
    CacheThrough(cache, FrozenTeacher(decoder), of).fill(wanted)
    cache.close()
    cache = TargetCache.open(tmp_path / "cache")
    found = read(cache, wanted).label_log_prob
    assert found[3] == 0
    assert bool((found[:3] < 0).all())
    assert bool((read(cache, batch(1)).label_log_prob < 0).all()), "kept whole, for those who do not ignore it"


def test_labels_that_are_not_the_next_tokens_are_refused(decoder: Decoder, tmp_path: Path) -> None:
    cache = TargetCache.create(tmp_path / "cache", identity(decoder))
    through = CacheThrough(cache, FrozenTeacher(decoder), cache.identity)
    through.fill(batch(0, 1))
    cut = batch(0, 1)
    cut["labels"][1, -1] = -100
    other = batch(0, 1)
    other["tokens"][1, 5], other["labels"][1, 4] = 7, 9
    message = r"sequence 1 of the batch: label 9 at position 4, where the next token is 7; cached targets are those of"
    for wrong, why in [(cut, r"sequence 1 of the batch: its last label is ignored"), (other, message)]:
        for use in (through.fill, through.targets, CachedTargets(cache).targets):
            with pytest.raises(InputError, match=why):
                use(wrong)
    assert len(cache) == 2
    another_end = batch(0)
    another_end["labels"][0, -1] = (another_end["labels"][0, -1] + 1) % V
    with pytest.raises(InputError, match=r"no targets for sequence 0 of the batch"):
        CachedTargets(cache).targets(another_end)
    cache.release()


# ---- keys


def test_keys_of_a_stream_are_those_of_its_windows() -> None:
    keys = stream_keys(STREAM, L)
    assert keys.dtype == np.int64
    assert len(set(keys.tolist())) == WINDOWS
    every = batch(*range(WINDOWS))
    assert keys.tolist() == window_keys(every["tokens"], every["labels"])
    assert keys.tolist() == stream_keys(STREAM.astype(np.uint32), L).tolist()
    assert keys[:5].tolist() == stream_keys(STREAM[: 5 * L + 1], L).tolist()
    long = np.arange(2**20 + 99, dtype=np.uint32)  # more than is looked at at a time
    starts = np.arange(0, len(long) - 1024, 1024)
    whole = windows_at(long, starts, 1024)
    assert stream_keys(long, 1024).tolist() == window_keys(whole["tokens"], whole["labels"])
    with pytest.raises(InputError, match=r"seq_len=16: the training split has 16 tokens; one window needs 17"):
        stream_keys(STREAM[:16], L)


# ---- forecast


@every_kind
def test_forecast_is_within_five_percent(decoder: Decoder, tmp_path: Path, kind: str) -> None:
    of = identity(decoder, kind)
    cache = filled(tmp_path / "cache", decoder, of)
    distinct = None
    if kind == "sampled":
        kept = [(read(cache, batch(window)).weights > 0).sum(dim=1) for window in range(WINDOWS)]
        distinct = torch.cat(kept).float().mean().item()
        assert forecast(of, 9, 4).total_bytes > forecast(of, 9, 4, distinct).total_bytes, "without it, an upper bound"
    expected = forecast(of, WINDOWS, 4, distinct)
    real = sum(len(content) for content in contents(tmp_path / "cache").values())
    assert expected.total_bytes == pytest.approx(real, rel=0.05)
    assert expected.bytes_per_token == pytest.approx(real / (WINDOWS * L), rel=0.05)
    assert expected.windows == WINDOWS


def test_a_full_disk_is_refused_before_anything_is_computed(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = forecast(identity(decoder), WINDOWS, 4)
    usage = lambda free: lambda path: type("usage", (), {"free": free})  # noqa: E731
    monkeypatch.setattr("shutil.disk_usage", usage(needed.total_bytes))
    needed.require_room(tmp_path / "not" / "yet" / "there")
    monkeypatch.setattr("shutil.disk_usage", usage(needed.total_bytes - 1))
    with pytest.raises(InputError, match=r"MB free, but the targets need 0\.0 MB"):
        needed.require_room(tmp_path / "not" / "yet" / "there")
    assert forecast(identity(decoder), 3, 4).total_bytes < needed.total_bytes / 3, "what is added, not what is there"


def test_a_disk_that_fills_up_leaves_the_shards_before(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = identity(decoder)
    cache = TargetCache.create(tmp_path / "cache", of, 2)
    through = CacheThrough(cache, FrozenTeacher(decoder), of)
    through.fill(batch(0, 1))

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match=r"shard-00001\.safetensors: cannot be written \(No space left on device\)"):
        through.fill(batch(2, 3))
    monkeypatch.undo()
    cache.release()
    assert sorted(contents(tmp_path / "cache")) == [".lock", "manifest.json", "shard-00000.safetensors"]
    assert len(TargetCache.open(tmp_path / "cache", of.settings())) == 2


# ---- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": "f" * 64}, r"is stale: made by a teacher with other weights \(teacher=[0-9a-f]{12} in its man"),
        ({"tokenizer": None}, r"was made with another tokenizer \(tokenizer=t{12} in its manifest.json, None here\)"),
        ({"seq_len": 8}, r"has windows of another length \(seq_len=16 in its manifest.json, 8 here\)"),
        ({"vocab_size": 41}, r"has another vocabulary \(vocab_size=40 in its manifest.json, 41 here\)"),
        ({"kind": "sampled"}, r"holds targets of another kind \(kind=top_k in its manifest.json, sampled here\)"),
        ({"temperature": 2.0}, r"was made at another temperature \(temperature=1.0 in its manifest.json, 2.0 here\)"),
        ({"k": 7, "seq_len": 8}, r"was made with another k \(k=6 .*, 7 here\); it has windows of another length"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_what_does_not_fit_is_refused_by_name(
    decoder: Decoder, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    of = identity(decoder)
    filled(tmp_path, decoder, of)
    with pytest.raises(InputError, match=message):
        TargetCache.open(tmp_path, change)
    TargetCache.open(tmp_path, {key: of.settings()[key] for key in change})


def test_a_tail_is_kept_and_told_apart(decoder: Decoder, tmp_path: Path) -> None:
    """What is read without a tail sums to one whatever fp16 made of it; neither cache passes for the other."""
    bucket = identity(decoder)
    none = identity(decoder, form=TargetFormat("top_k", k=6, tail="none"))
    assert "tail" not in bucket.settings(), "caches of before are as they were"
    for of in (bucket, none):
        filled(tmp_path / of.form.tail, decoder, of)
    kept = {
        of.form.tail: CachedTargets(TargetCache.open(tmp_path / of.form.tail, of.settings())).targets(batch(0, 3))
        for of in (bucket, none)
    }
    assert isinstance(kept["none"], TopKTargets) and isinstance(kept["bucket"], TopKTargets)
    torch.testing.assert_close(kept["none"].log_probs.exp().sum(dim=1), torch.ones(2 * L), atol=1e-6, rtol=0)
    assert (kept["bucket"].log_probs.exp().sum(dim=1) < 0.99).any()
    for there, wanted in ((bucket, none), (none, bucket)):
        with pytest.raises(InputError, match=r"was made with another tail \(tail=.* here"):
            TargetCache.open(tmp_path / there.form.tail, wanted.settings())


def test_dense_targets_fit_every_temperature(decoder: Decoder, tmp_path: Path) -> None:
    filled(tmp_path, decoder, identity(decoder, "dense"))
    TargetCache.open(tmp_path, {"temperature": 3.0})


def test_adding_to_another_cache_is_refused(decoder: Decoder, tmp_path: Path) -> None:
    of = identity(decoder)
    filled(tmp_path / "cache", decoder, of)
    before = contents(tmp_path / "cache")
    with pytest.raises(InputError, match=r"is stale: made by a teacher with other weights"):
        TargetCache.create(tmp_path / "cache", dataclasses.replace(of, teacher="0" * 64))
    assert contents(tmp_path / "cache") == before
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").touch()
    with pytest.raises(InputError, match=r"no cache, it holds holiday.jpg and no manifest.json"):
        TargetCache.create(tmp_path / "photos", of)
    with pytest.raises(InputError, match=r"cannot be written \(File exists\)"):
        TargetCache.create(tmp_path / "photos" / "holiday.jpg", of)
    (tmp_path / "cache" / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"it holds shard-00000.safetensors and no manifest.json"):
        TargetCache.create(tmp_path / "cache", of)  # nothing is thrown away


def test_one_process_adds_at_a_time(decoder: Decoder, tmp_path: Path) -> None:
    of = identity(decoder)
    first = TargetCache.create(tmp_path, of)
    with pytest.raises(InputError, match=r"another process is adding to this cache"):
        TargetCache.create(tmp_path, of)
    first.close()
    TargetCache.create(tmp_path, of).close()
    with pytest.raises(InputError, match=r"opened to read, nothing can be added"):
        CacheThrough(TargetCache.open(tmp_path), FrozenTeacher(decoder), of).fill(batch(0))


def test_no_cache_and_damaged_manifests(decoder: Decoder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: no cache of targets, it has no manifest.json"):
        TargetCache.open(tmp_path / "nowhere")
    filled(tmp_path, decoder, identity(decoder))
    path = tmp_path / "manifest.json"
    good = json.loads(path.read_text())
    for content, message in [
        (path.read_text()[:-20], r"manifest.json: damaged"),
        ("[]", r"manifest.json: found a list; must be a mapping"),
        ("{}", r"manifest.json: not the manifest of a cache of targets"),
        (json.dumps({**good, "version": 1}), r"manifest.json: version 1; must be 2, make the cache anew"),
        (json.dumps({**good, "settings": {}}), r"manifest.json: settings.teacher: missing"),
        (json.dumps({**good, "settings": []}), r"manifest.json: damaged"),
        (json.dumps({**good, "shards": None}), r"manifest.json: damaged"),
        (json.dumps({**good, "shards": [{"file": "x"}]}), r"manifest.json: shards\[0\].windows: missing"),
        (json.dumps({**good, "shards": [{**good["shards"][0], "windows": 3}]}), r"4 windows, the manifest says 3"),
    ]:
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            TargetCache.open(tmp_path, good["settings"])


@every_kind
def test_a_manifest_that_lacks_a_setting_is_refused(decoder: Decoder, tmp_path: Path, kind: str) -> None:
    of = identity(decoder, kind)
    filled(tmp_path, decoder, of)
    path = tmp_path / "manifest.json"
    good = json.loads(path.read_text())
    assert set(good["settings"]) >= {"teacher", "tokenizer", "seq_len", "vocab_size", "kind"}
    for key in good["settings"]:
        without = {name: value for name, value in good["settings"].items() if name != key}
        for settings in (without, {**good["settings"], key: [3]}):
            path.write_text(json.dumps({**good, "settings": settings}))
            message = rf"manifest.json: settings\.(form\.)?{key}: (missing|found)"
            with pytest.raises(InputError, match=message):
                TargetCache.open(tmp_path, of.settings())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("damage", "message"),
    [(truncate, r"shard-00001.safetensors: truncated: \d+ bytes"), (Path.unlink, r"shard-00001.safetensors: missing")],
)
def test_incomplete_shards_are_refused_at_once(
    decoder: Decoder, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    of = identity(decoder)
    filled(tmp_path, decoder, of)
    damage(tmp_path / "shard-00001.safetensors")
    with pytest.raises(InputError, match=message):
        TargetCache.open(tmp_path)
    with pytest.raises(InputError, match=message):
        TargetCache.create(tmp_path, of)


def test_a_corrupt_byte_is_found(decoder: Decoder, tmp_path: Path) -> None:
    cache = filled(tmp_path, decoder, identity(decoder))
    cache.verify()
    path = tmp_path / "shard-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"shard-00002.safetensors: corrupt, its sha256 is [0-9a-f]{12} and the man"):
        TargetCache.open(tmp_path).verify()
    path.write_bytes(b"\xff" * len(content))
    for use in (lambda: TargetCache.open(tmp_path), lambda: TargetCache.create(tmp_path, identity(decoder))):
        with pytest.raises(
            InputError, match=r"shard-00002.safetensors: damaged, it cannot be read .* make the cache an"
        ):
            use()
    with pytest.raises(InputError, match=r"shard-00002.safetensors: damaged, row 1 cannot be read"):
        read(cache, batch(9))


def test_the_sequence_is_named(decoder: Decoder, tmp_path: Path) -> None:
    of = identity(decoder)
    cache = TargetCache.create(tmp_path, of)
    source = CacheThrough(cache, FrozenTeacher(decoder), of)
    source.fill(batch(0, 1, 2))
    cache.close()
    cached = CachedTargets(TargetCache.open(tmp_path))
    cached.targets(batch(2, 0))
    begins = ", ".join(map(str, STREAM[5 * L : 5 * L + 4]))
    message = rf"no targets for sequence 1 of the batch \(it begins with {begins}\): none of the 3 windows"
    with pytest.raises(InputError, match=message):
        cached.targets(batch(1, 5))
    shifted = windows_at(STREAM, np.array([0, L + 1]), L)
    with pytest.raises(InputError, match=r"no targets for sequence 1 of the batch .* windows cut elsewhere"):
        cached.targets(shifted)
    with pytest.raises(InputError, match=r"tokens of shape \[1, 8\]; its windows have seq_len=16"):
        cached.targets({name: value[:, :8] for name, value in batch(0).items() if name != "starts"})


def test_every_window_and_seed_has_draws_of_its_own(decoder: Decoder) -> None:
    of = identity(decoder, "sampled")
    generators = [of.generator(0), of.generator(1), dataclasses.replace(of, seed=6).generator(0)]
    assert len({generator.initial_seed() for generator in generators}) == 3
    assert of.generator(1).initial_seed() == generators[1].initial_seed()


def test_impossible_identities_are_refused(decoder: Decoder) -> None:
    with pytest.raises(InputError, match=r"seq_len=0: must be a number >= 1"):
        identity(decoder, seq_len=0)
    with pytest.raises(InputError, match=r"k=41: the vocabulary has 40 entries"):
        identity(decoder, form=TargetFormat("top_k", k=41))


# ---- survival


@pytest.mark.slow_but_for("7-")
@every_kind
@pytest.mark.parametrize("stop", range(1, 9))
def test_killed_at_any_write_and_resumed_equals_uninterrupted(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, stop: int
) -> None:
    """At the stop-th time that something would reach its name on disk, the process is gone."""
    of = identity(decoder, kind)
    filled(tmp_path / "whole", decoder, of)
    writes = iter(range(1, 99))
    replace = Path.replace

    def die(self: Path, target: Path) -> Path:
        if tmp_path in self.parents and next(writes) == stop:  # a thread that another test left may write elsewhere
            raise SystemExit
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)  # nobody tidies up after kill -9
        try:
            filled(tmp_path / "cut", decoder, of)
            assert stop == 8, "seven writes: an empty manifest, then three shards with theirs"
        except SystemExit:
            pass
    if stop > 1:
        listed = TargetCache.open(tmp_path / "cut", of.settings())
        assert len(listed) == 4 * ((stop - 2) // 2)
        listed.verify()
    filled(tmp_path / "cut", decoder, of)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_what_a_killed_process_left_is_removed_by_the_next_writer(decoder: Decoder, tmp_path: Path) -> None:
    of = identity(decoder)
    filled(tmp_path, decoder, of)
    before = contents(tmp_path)
    for name in ("shard-00003.safetensors", ".shard-00004.safetensors.partial"):
        (tmp_path / name).write_bytes(b"half")
    TargetCache.open(tmp_path)
    assert len(contents(tmp_path)) == len(before) + 2, "a reader changes nothing"
    TargetCache.create(tmp_path, of).close()
    assert contents(tmp_path) == before


# ---- sources


@every_kind
def test_cache_through_computes_what_is_missing_once(decoder: Decoder, tmp_path: Path, kind: str) -> None:
    of = identity(decoder, kind)
    whole = filled(tmp_path / "whole", decoder, of)
    cache = TargetCache.create(tmp_path / "cache", of, 4)
    source = CacheThrough(cache, FrozenTeacher(decoder), of)
    for windows, hits, misses in [((8, 3), 0, 2), ((3, 8), 2, 2), ((3, 5), 3, 3), ((1, 1), 4, 4), ((8, 1), 6, 4)]:
        found = source.targets(batch(*windows))
        assert (source.hits, source.misses) == (hits, misses)
        for mine, theirs in zip(found, read(whole, batch(*windows)), strict=True):
            torch.testing.assert_close(torch.as_tensor(mine), torch.as_tensor(theirs), rtol=1e-2, atol=1e-2)
    assert len(cache) == 4
    cache.close()
    again = TargetCache.create(tmp_path / "cache", of, 4)
    resumed = CacheThrough(again, FrozenTeacher(decoder), of)
    before = found
    for mine, theirs in zip(resumed.targets(batch(8, 1)), before, strict=True):
        assert torch.equal(torch.as_tensor(mine), torch.as_tensor(theirs)), "the same from memory and from disk"
    resumed.fill(batch(*range(WINDOWS)))
    assert (resumed.hits, resumed.misses) == (6, 8)
    moved = windows_at(np.concatenate([STREAM[:3], STREAM]), 3 + L * np.array([8, 1]), L)
    resumed.fill(moved)
    assert (resumed.hits, resumed.misses) == (8, 8), "the same text elsewhere is the same window"
    again.close()
    complete = CachedTargets(TargetCache.open(tmp_path / "cache", of.settings()))
    complete.cache.verify()
    complete.targets(batch(*range(WINDOWS)))


def test_the_state_of_a_cache_through_is_small_and_plain(decoder: Decoder, tmp_path: Path) -> None:
    of = identity(decoder)
    cache = TargetCache.create(tmp_path / "cache", of, 100)
    source = CacheThrough(cache, FrozenTeacher(decoder), of)
    source.fill(batch(4, 2))
    torch.save(source.state_dict(), tmp_path / "state.pt")
    assert sorted(TargetCache.open(tmp_path / "cache")) == sorted(stream_keys(STREAM, L)[[2, 4]].tolist())
    source.fill(batch(6, 4))
    cache.close()

    def resumed(same_run: bool) -> CacheThrough:
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        assert state["known"].dtype == torch.int64
        again = TargetCache.create(tmp_path / "cache", of, 100)
        it = CacheThrough(again, FrozenTeacher(decoder), of)
        it.load_state_dict(state, same_run)
        it.fill(batch(6, 4))
        again.close()
        return it

    assert (resumed(True).misses, source.misses) == (3, 3), "computed and counted as it was before the kill"
    assert resumed(False).misses == 2, "a run that only starts from the checkpoint takes what is there"
    for file in (tmp_path / "cache").iterdir():
        file.unlink()
    emptied = resumed(True)
    assert emptied.misses == 4, "the folder was deleted: nothing is known"


def test_a_frozen_teacher_is_not_touched(decoder: Decoder) -> None:
    decoder.train()
    before = weights_hash(decoder)
    source = FrozenTeacher(decoder)
    with torch.enable_grad():
        found = source.targets(batch(0, 4))
    assert not decoder.training
    assert not found.hidden.requires_grad
    assert not found.weight.requires_grad
    assert found.hidden.shape == (2 * L, decoder.head.in_features)
    torch.testing.assert_close(found.hidden @ found.weight.T, logits_of(decoder, batch(0, 4)))
    assert weights_hash(decoder) == before, "the selection biases of its routers among them"


def test_weights_hash_sees_every_weight_and_buffer(decoder: Decoder) -> None:
    before = weights_hash(decoder)
    assert weights_hash(decoder) == before
    for name, tensor in decoder.state_dict().items():
        tensor.view(-1)[-1] += 1
        assert weights_hash(decoder) != before, name
        tensor.view(-1)[-1] -= 1
    assert any(name.endswith("expert_bias") for name in decoder.state_dict())
    assert weights_hash(decoder.bfloat16()) != before
