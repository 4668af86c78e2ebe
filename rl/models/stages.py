"""How the layers of a model are cut into pipeline stages. Imports nothing: configurations are checked with it."""

from __future__ import annotations


def stage_layers(layers: int, pp: int, vpp: int | None = None) -> tuple[int, ...]:
    """Layers of each part of a pipeline: evenly if that goes, else with shorter first and last stages.

    The first stage has the embedding to compute too, the last one the output layer and the loss. Stages between them
    are of one size, as Megatron wants it: 94 layers on 4 stages are 23, 24, 24, 23.

    Args:
        layers: of the model.
        pp: pipeline stages.
        vpp: virtual stages of each; part ``v * pp + p`` is the v-th of stage p.

    Raises:
        ValueError: a cut that leaves a stage without layers, or an uneven one with virtual stages.
    """
    parts = pp * (vpp or 1)
    even, rest = divmod(layers, parts)
    if not rest and even:
        return (even,) * parts
    if parts > pp:
        raise ValueError(f"pp*vpp = {parts} must divide {layers} layers: virtual stages are cut evenly; set vpp to 1")
    middle = -(-layers // pp)
    ends = layers - middle * (pp - 2)
    if ends < 2:
        raise ValueError(
            f"pp = {pp} leaves a stage without layers: {layers} layers are {middle} for each stage in the middle, and "
            f"{max(0, ends)} for the first and the last; lower pp"
        )
    return (ends - ends // 2, *((middle,) * (pp - 2)), ends // 2)
