import json
from pathlib import Path

import pytest

from rl.rollout.building import engine_arguments
from rl.rollout.config import EngineConfig


@pytest.mark.parametrize(("fields", "graphs"), [({}, True), ({"kv_lora_rank": 512}, False)])
def test_graphs_only_where_updates_reach_them(tmp_path: Path, fields: dict, graphs: bool) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_experts": 4} | fields))
    arguments = engine_arguments(
        EngineConfig(str(tmp_path), device="cuda", dtype="bfloat16", cuda_graphs=True, max_num_seqs=8, sleep_mode=True)
    )
    assert arguments["enforce_eager"] is not graphs
    assert ("compilation_config" in arguments) is graphs
    assert arguments["enable_return_routed_experts"]
    assert arguments["enable_sleep_mode"]
    if graphs:
        assert arguments["compilation_config"]["cudagraph_capture_sizes"] == [1, 2, 4, 8]


def test_a_cpu_engine_is_eager(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    arguments = engine_arguments(EngineConfig(str(tmp_path)))
    assert arguments["enforce_eager"]
    assert "enable_return_routed_experts" not in arguments
