"""Everything about weight updates that needs no engine."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rl.models import tiny
from rl.rollout.weights import (
    WeightMismatch,
    check_manifest,
    checked,
    checkpoint_manifest,
    fetch,
    manifest_of,
    ties_embeddings,
)

EXPECTED = {"a": (2, 3), "b": (4,), "lm_head.weight": (5, 3)}


def test_manifest_of_a_checkpoint_is_that_of_its_tensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = tiny.llama(tmp_path, layers=1, tie_word_embeddings=True)
    assert checkpoint_manifest(path) == manifest_of([load_file(path / "model.safetensors")])
    assert ties_embeddings(path)
    with pytest.raises(FileNotFoundError, match=r"\*\.safetensors"):
        checkpoint_manifest(tmp_path / "nowhere")


def test_manifest_of_references_must_be_given() -> None:
    with pytest.raises(ValueError, match="pass manifest="):
        manifest_of([object()])


def test_equal_manifests_pass_and_a_tied_output_layer_may_be_absent() -> None:
    check_manifest({"b": [4], "a": [2, 3], "lm_head.weight": [5, 3]}, EXPECTED)
    check_manifest({"a": (2, 3), "b": (4,)}, EXPECTED, optional=["lm_head.weight"])
    check_manifest(EXPECTED, {"a": (2, 3), "b": (4,)}, optional=["lm_head.weight"])


def test_all_faults_are_reported_at_once() -> None:
    with pytest.raises(WeightMismatch) as caught:
        check_manifest({"a": (3, 2), "c": (1,), "lm_head.weight": (5, 3)}, EXPECTED)
    for words in ("1 missing: b", "1 unknown: c", "a: expected [2, 3], got [3, 2]", "keeps its weights"):
        assert words in str(caught.value)


def test_long_lists_are_cut() -> None:
    with pytest.raises(WeightMismatch, match=r"30 missing: t00, t01, t02, t03, t04, \.\.\.;|30 missing: .*, \.\.\."):
        check_manifest({}, {f"t{i:02}": (1,) for i in range(30)})


def test_stream_is_held_against_the_manifest() -> None:
    pairs = [("a", torch.zeros(2, 3)), ("b", torch.zeros(4))]
    manifest = {"a": (2, 3), "b": (4,)}
    assert [name for name, _ in checked(pairs, manifest)] == ["a", "b"]
    with pytest.raises(WeightMismatch, match="1 announced tensors never came: b"):
        list(checked(pairs[:1], manifest))
    with pytest.raises(WeightMismatch, match="tensor a came twice"):
        list(checked(pairs[:1] * 2, manifest))
    with pytest.raises(WeightMismatch, match="tensor x came without being in the manifest"):
        list(checked([("x", torch.zeros(1))], manifest))
    with pytest.raises(WeightMismatch, match=r"tensor b: announced \[4\], came \[5\]"):
        list(checked([("b", torch.zeros(5))], manifest))


def test_fetch_takes_arrays_tensors_and_references_one_by_one() -> None:
    class Reference:
        def __init__(self, value: dict) -> None:
            self.value = value

        def future(self):
            return self

        def result(self, timeout: float) -> dict:
            fetched.append(timeout)
            return self.value

    fetched: list[float] = []
    frozen = np.ones(2, np.float32)
    frozen.flags.writeable = False
    pairs = fetch([{"t": torch.zeros(1)}, Reference({"n": frozen})], 3.0)
    assert next(pairs)[0] == "t"
    assert fetched == [], "a chunk is fetched only when it is needed"
    name, tensor = next(pairs)
    assert (name, fetched) == ("n", [3.0])
    assert torch.equal(tensor, torch.ones(2))


def test_a_chunk_that_does_not_come_is_named() -> None:
    class Never:
        def future(self):
            return self

        def result(self, timeout: float) -> dict:
            raise TimeoutError

    with pytest.raises(TimeoutError, match=r"weight chunk 0 did not arrive within 0\.5 s"):
        list(fetch([Never()], 0.5))
