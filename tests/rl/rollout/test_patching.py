"""The guards of the patches; that they do their work is seen in ``test_engine.py`` and in the models' tests."""

import pytest

from rl.rollout import patching
from rl.rollout.compat import UnexpectedVllm


class Target:
    def method(self, layer: int) -> int:
        first_step = layer
        return first_step


def test_a_target_as_expected_is_returned_and_patched_once() -> None:
    class Fresh(Target):
        method = Target.__dict__["method"]

    original = patching.expect(Fresh, "method", ("self", "layer"), ("first_step = layer",))
    assert original is Target.method

    def replacement(self: Fresh, layer: int) -> int:
        return -original(self, layer)

    patching.replace(Fresh, "method", replacement)
    assert Fresh().method(2) == -2
    assert patching.expect(Fresh, "method", ("self", "layer"), ("first_step = layer",)) is None


@pytest.mark.parametrize(
    ("name", "parameters", "fragment", "message"),
    [
        ("gone", ("self",), "", "to exist; use a tested vLLM version"),
        ("method", ("self", "other"), "", "to take .*'other'.* it takes .*'layer'"),
        ("method", ("self", "layer"), "second_step", "expected 'second_step' in .*Target.method, it is gone"),
    ],
)
def test_a_target_that_changed_is_refused(name: str, parameters: tuple, fragment: str, message: str) -> None:
    with pytest.raises(UnexpectedVllm, match=message):
        patching.expect(Target, name, parameters, (fragment,))
