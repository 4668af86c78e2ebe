import pytest

from rl.models.stages import stage_layers


@pytest.mark.parametrize(
    ("layers", "pp", "vpp", "expected"),
    [
        (8, 1, None, (8,)),
        (8, 4, None, (2, 2, 2, 2)),
        (8, 2, 2, (2, 2, 2, 2)),
        (5, 2, None, (3, 2)),
        (7, 4, None, (2, 2, 2, 1)),
        (94, 4, None, (23, 24, 24, 23)),
        (94, 8, None, (11, *(12,) * 6, 11)),
        (61, 4, None, (15, 16, 16, 14)),
        (46, 4, None, (11, 12, 12, 11)),
    ],
)
def test_cuts(layers, pp, vpp, expected):
    assert stage_layers(layers, pp, vpp) == expected


@pytest.mark.parametrize("layers", range(2, 100))
def test_every_cut_has_all_layers_and_none_is_longer_than_the_middle(layers):
    for pp in range(2, layers + 1):
        try:
            cut = stage_layers(layers, pp)
        except ValueError as error:
            assert "lower pp" in str(error)  # noqa: PT017
            continue
        assert sum(cut) == layers
        assert len(cut) == pp
        assert min(cut) >= 1
        assert max(cut) == -(-layers // pp)


@pytest.mark.parametrize(
    ("layers", "pp", "vpp", "message"),
    [
        (6, 2, 2, r"pp\*vpp = 4 must divide 6 layers: .* set vpp to 1"),
        (3, 4, None, "pp = 4 leaves a stage without layers"),
        (5, 4, None, "2 for each stage in the middle, and 1 for the first and the last; lower pp"),
    ],
)
def test_cuts_that_cannot_be(layers, pp, vpp, message):
    with pytest.raises(ValueError, match=message):
        stage_layers(layers, pp, vpp)
