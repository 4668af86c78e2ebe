"""The tests run on the stack that they say they run on."""

import importlib.metadata
import os

import pytest


def imported_megatron():
    import megatron.core

    return megatron.core.__version__, importlib.metadata.version("megatron-core"), megatron.core.__file__


@pytest.mark.skipif("ULTRAEP_EXPECT_MCORE" not in os.environ, reason="scripts/test.sh sets ULTRAEP_EXPECT_MCORE")
def test_ranks_import_the_expected_megatron_core(ranks):
    expected = os.environ["ULTRAEP_EXPECT_MCORE"]
    for imported, metadata, path in ranks(2).run(imported_megatron):
        # Inside a git repository, whoever's it is, newer releases append "+<commit>".
        assert imported.partition("+")[0] == expected, path
        assert metadata == expected
