"""A small tokenizer for the tests of this directory."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from rl.models.tiny import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(train_tokenizer(["what is the sum"], tmp_path_factory.mktemp("tokenizer")))
