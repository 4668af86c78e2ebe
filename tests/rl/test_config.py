import copy

import pytest
import yaml

from rl.config import ConfigError, describe, field_paths, from_dict, load, to_dict, to_yaml
from rl.config.algorithm import PRESETS
from rl.config.rules import RULES
from rl.config.sections import RunConfig

BASE = {
    "run": {"name": "smoke", "steps": 3},
    "model": {"path": "models/tiny", "dtype": "float32"},
    "data": {
        "train": {"reasoning_gym": "chain_sum", "size": 100, "seed": 0},
        "eval": {"reasoning_gym": "chain_sum", "size": 50, "seed": 1000},
        "prompts_per_step": 8,
        "samples_per_prompt": 4,
    },
    "reward": {"path": "rl.rewards.builtin:reasoning_gym"},
    "evaluation": {"prompts": 50},
}


def changed(*changes):
    """BASE with (dotted path, value) changes; a value of `...` removes the key."""
    raw = copy.deepcopy(BASE)
    for path, value in changes:
        node = raw
        *parents, last = path.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        if value is ...:
            del node[last]
        else:
            node[last] = copy.deepcopy(value)
    return raw


def violations(*changes):
    with pytest.raises(ConfigError) as error:
        from_dict(changed(*changes))
    return {violation.path: violation.message for violation in error.value.violations}


def test_base_is_valid_and_immutable():
    config = from_dict(BASE)
    assert str(config.output_dir) == "runs/smoke"
    assert config.samples_per_step == 32
    assert config.longest_sample == 512 + 256
    assert config.engine_dtype == "float32"
    assert not config.keeps_reference
    with pytest.raises(ValueError, match="frozen"):
        config.run.seed = 3


def test_yaml_round_trip_with_every_field_set():
    config = from_dict(changed(("algorithm.kl", {"in": "reward", "coef": 0.1}), ("sampling.stop", ["a", "b: ü"])))
    again = from_dict(yaml.safe_load(to_yaml(config)))
    assert again == config
    assert again.algorithm.kl.apply_in == "reward"
    assert list(to_dict(config)) == list(RunConfig.model_fields)


def test_every_field_is_described():
    text = describe()
    for path in field_paths():
        assert f"{path} (" in text
    assert "None" not in text
    assert describe("trainer.optimizer").count("\n    ") == len(
        [path for path in field_paths() if path.startswith("trainer.optimizer.")]
    )
    with pytest.raises(ConfigError, match="Did you mean `trainer`"):
        describe("trainr")


def test_file_and_overrides(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(BASE))
    config = load(
        path,
        [
            "run.seed=1",
            "run.seed=7",
            "trainer.optimizer.lr=1e-4",
            "sampling.stop=[a, b]",
            "data.eval=null",
            "evaluation={}",
            "model.create_args.layers=4",
            "logging.wandb=off",
        ],
    )
    assert config.run.seed == 7
    assert config.trainer.optimizer.lr == 1e-4
    assert config.sampling.stop == ("a", "b")
    assert config.data.eval is None
    assert config.model.create_args == {"layers": 4}
    assert config.logging.wandb == "off"


def test_numbers_as_people_write_them(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(BASE) + "trainer: {optimizer: {lr: 1e-4}}\nlogging: {wandb: off}\n")
    config = load(path)
    assert config.trainer.optimizer.lr == 1e-4
    assert config.logging.wandb == "off"


@pytest.mark.parametrize("text", ["run.seed", "=3", "run..seed=3"])
def test_malformed_overrides(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(BASE))
    with pytest.raises(ConfigError, match=r"section\.field=value"):
        load(path, [text])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("run: [", "expected YAML"),
        ("- a\n- b\n", "mapping of sections"),
        ("run: {name: a}\nrun: {name: b}\n", "duplicate"),
        ("run: {name: '${missing.key}'}\n", "missing"),
    ],
)
def test_unreadable_files(tmp_path, content, said):
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=said):
        load(path)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="found none"):
        load(tmp_path / "none.yaml")


def test_an_empty_file_names_the_required_sections(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("")
    with pytest.raises(ConfigError) as error:
        load(path)
    assert [v.path for v in error.value.violations] == ["run", "model", "data", "reward"]


def test_files_and_rewards_can_be_written_in_several_ways():
    for files in ("a.jsonl", ["a.jsonl"]):
        for key in ("files", "jsonl"):
            config = from_dict(changed(("data.train", {key: files})))
            assert list(map(str, config.data.train.files)) == ["a.jsonl"]
    assert to_dict(config)["data"]["train"]["files"] == ["a.jsonl"]
    for path in ("a.b:f", "a.b.f", "sub dir/b.py:f", "/x/b.py:f"):
        assert from_dict(changed(("reward.path", path))).reward.path == path
    assert set(violations(("data.train", {"jsonl": "a.jsonl", "files": "b.jsonl"}))) == {"data.train.jsonl"}


def test_everything_wrong_is_reported_at_once():
    found = violations(
        ("run.sed", 1),
        ("trainer.tp", 2),
        ("optimzer", {"lr": 1}),
        ("sampling.temperature", -1),
        ("sampling.stop", ["a", 3]),
        ("algorithm.kl", {"in": "los"}),
        ("evaluation", 3),
        ("reward.path", "no_colon"),
        ("run.name", ...),
        ("sampling.top_p", 0.5),
        ("trainer.parallel", {"pp": 2}),
        ("data.prompts_per_step", 1.5),
        ("data.train.size", True),
    )
    assert set(found) == {
        "run.sed",
        "trainer.tp",
        "optimzer",
        "sampling.temperature",
        "sampling.stop.1",
        "algorithm.kl.in",
        "evaluation",
        "reward.path",
        "run.name",
        "sampling.top_p",
        "trainer.ranks",
        "data.prompts_per_step",
        "data.train.size",
    }
    assert "Did you mean `run.seed`" in found["run.sed"]
    assert "or `trainer.parallel.tp`" in found["trainer.tp"]
    assert "or `trainer.optimizer`" in found["optimzer"]
    assert "expected a number > 0.0, came -1" in found["sampling.temperature"]
    assert "expected a text, came 3" in found["sampling.stop.1"]
    assert "'loss' or 'reward'" in found["algorithm.kl.in"]
    assert "package.module:function" in found["reward.path"]
    assert "required" in found["run.name"]
    assert "expected a whole number, came 1.5" in found["data.prompts_per_step"]


def test_rules_are_silent_about_fields_that_are_invalid_themselves():
    # mini_batches must divide the samples, but their number is not known.
    found = violations(("data.prompts_per_step", "eight"), ("algorithm.mini_batches", 7))
    assert set(found) == {"data.prompts_per_step"}


def test_the_message_lists_one_violation_per_line():
    with pytest.raises(ConfigError) as error:
        from_dict(changed(("run.sed", 1), ("sampling.top_k", 5)), source="a.yaml")
    lines = str(error.value).split("\n")
    assert lines[0] == "a.yaml: 2 errors in the configuration"
    assert lines[1].startswith("  - run.sed: ")
    assert lines[2].startswith("  - sampling.top_k: ")


def test_presets_set_defaults_that_fields_win_over():
    plain, dapo = from_dict(BASE).algorithm, from_dict(changed(("algorithm.preset", "dapo"))).algorithm
    assert (dapo.clip_low, dapo.clip_high, dapo.aggregation) == (0.2, 0.28, "token_mean")
    assert dapo.dynamic_sampling.enabled
    assert dapo.dynamic_sampling.max_rounds == plain.dynamic_sampling.max_rounds
    assert dapo.overlong.buffer_tokens(256) == 51
    mine = from_dict(
        changed(
            ("algorithm", {"preset": "dapo", "clip_high": 0.3, "dynamic_sampling": {"max_rounds": 3}}),
            ("algorithm.overlong", {"buffer": 0}),
        )
    ).algorithm
    assert mine.clip_high == 0.3
    assert mine.dynamic_sampling.enabled
    assert mine.dynamic_sampling.max_rounds == 3
    assert mine.overlong.buffer_tokens(256) == 0
    rloo = from_dict(changed(("algorithm", {"preset": "rloo", "kl": {"in": "loss"}}))).algorithm
    assert (rloo.kl.estimator, rloo.kl.apply_in, rloo.loss) == ("k1", "loss", "ppo_sequence")


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_resolve_and_load_again(preset):
    config = from_dict(changed(("algorithm.preset", preset), *([("critic", {})] if preset == "ppo" else [])))
    text = to_yaml(config)
    assert f"preset: {preset}" in text
    assert from_dict(yaml.safe_load(text)) == config
    for name, value in PRESETS[preset].items():
        shown = to_dict(config)["algorithm"][name]
        assert {**shown, **value} == shown if isinstance(value, dict) else shown == value


def test_an_unknown_preset_and_a_section_that_is_none_are_reported():
    found = violations(("algorithm", {"preset": "grop", "clip_lo": 3}))
    assert "'grpo'" in found["algorithm.preset"]
    assert "clip_low" in found["algorithm.clip_lo"]
    assert "a section" in violations(("algorithm", {"preset": "dapo", "overlong": 3}))["algorithm.overlong"]


EP4 = [("trainer.ranks", 4), ("trainer.parallel.ep", 4)]
PPO = [("algorithm.advantage", "gae"), ("critic", {})]
TWO_TP = [("trainer.ranks", 2), ("trainer.parallel.tp", 2), ("trainer.sequence_parallel", True)]

TAIL_ON_GPUS = [
    ("fuse.tail.enabled", True),
    ("fuse.tail.threshold", 8),
    ("stream.colocated", True),
    ("trainer.ranks", 4),
    ("trainer.backend", "nccl"),
    ("trainer.parallel.ep", 2),
    ("rollout.engines", 4),
    ("rollout.device", "cuda"),
    ("allow_untested", True),
]
BROKEN = [
    # (changes, path, part of the message)
    ([("data.train", {})], "data.train", "neither"),
    ([("data.train.files", "a.jsonl")], "data.train", "both"),
    ([("data.train.size", ...)], "data.train.size", "came null"),
    ([("data.train", {"files": "a.jsonl", "seed": 1})], "data.train.seed", "remove it"),
    ([("data.train", {"files": "a.jsonl", "args": {"x": 1}})], "data.train.args", "remove it"),
    ([("data.train", {"files": []})], "data.train.files", "an empty list"),
    ([("data.train", {"files": ["a.json", "b.parquet"]})], "data.train.files", "came a.json;"),
    ([("data.train", {"files": ["a.jsonl", "a.jsonl"]})], "data.train.files", "each file once"),
    ([("data.train.prompt_key", "question")], "data.train.prompt_key", "only files have columns"),
    ([("data.train.label_key", "answer")], "data.train.label_key", "only files have columns"),
    ([("data.chat_args", {"enable_thinking": False})], "data.chat_args", "data.chat is false"),
    ([("data.chat", True), ("data.chat_args", {"tokenize": True})], "data.chat_args", "set by the loop itself"),
    ([("evaluation.samples", 4)], "evaluation.samples", "the same response every time"),
    ([("data.prompt_template", "hello")], "data.prompt_template", "{prompt}"),
    ([("data.prompt_template", "Q: {prompt}"), ("data.chat", True)], "data.chat", "came both"),
    ([("data.eval.seed", 0)], "data.eval.seed", "would not be held out"),
    ([("data.eval.seed", 99)], "data.eval.seed", "99..148 and data.train uses 0..99"),
    ([("data.train.seed", 1049)], "data.eval.seed", "would not be held out"),
    (
        [("warmup", {"steps": 10, "batch_size": 10, "examples_seed": 901})],
        "data.eval.seed",
        "1000..1049 and warmup uses 901..1000",
    ),
    (
        [("data.train", {"jsonl": "a.jsonl"}), ("data.eval", {"files": ["b.parquet", "a.jsonl"]})],
        "data.eval.files",
        "would not be held out",
    ),
    ([("sampling.top_p", 0.9)], "sampling.top_p", "expected 1.0"),
    ([("sampling.top_k", 20)], "sampling.top_k", "expected 0"),
    ([("rollout.max_model_len", 700)], "rollout.max_model_len", "= 768"),
    ([("trainer.tokens_per_micro_batch", 766)], "trainer.tokens_per_micro_batch", "= 767"),
    ([("trainer.parallel.cp", 2)], "trainer.parallel.cp", "not supported"),
    ([("trainer.parallel.ep", 2)], "trainer.ranks", "at least etp*ep*pp = 2"),
    ([("trainer.ranks", 3), ("trainer.parallel.ep", 2)], "trainer.ranks", "multiple of etp*ep*pp = 2"),
    ([*TWO_TP, ("trainer.ranks", 3)], "trainer.ranks", "multiple of tp*pp = 2"),
    ([("trainer.parallel.vpp", 2)], "trainer.parallel.vpp", "need a pipeline"),
    ([("balance.enabled", True)], "balance.enabled", "leaves nothing to balance"),
    ([("balance", {"enabled": True, "slots": 0})], "balance", "slots must be >= 1"),
    (
        [("trainer.ranks", 2), ("trainer.parallel.ep", 2), ("balance", {"enabled": True, "node_size": 4})],
        "balance.node_size",
        "divisor of trainer.parallel.ep = 2",
    ),
    ([("balance.foresight", True)], "balance.foresight", "enable balancing"),
    ([("balance.reorder", True)], "balance.reorder", "enable balancing"),
    (
        [*EP4, ("balance", {"enabled": True, "compose": True}), ("rollout.capture_routes", False)],
        "balance.compose",
        "capture routes or remove it",
    ),
    (
        [*EP4, ("balance", {"enabled": True, "foresight": True}), ("algorithm.routes.train", "own")],
        "balance.foresight",
        "set `replay`",
    ),
    ([*TWO_TP, ("trainer.sequence_parallel", False)], "trainer.sequence_parallel", "expected true"),
    ([("trainer.sequence_parallel", True)], "trainer.sequence_parallel", "expected false"),
    ([("trainer.recompute", "selective")], "trainer.recompute_modules", "came none"),
    ([("trainer.recompute_modules", ["moe"])], "trainer.recompute_modules", "recompute is none"),
    (
        [("trainer.recompute", "selective"), ("trainer.recompute_modules", ["mo"])],
        "trainer.recompute_modules",
        "came mo;",
    ),
    ([("model.dtype", "float64"), ("trainer.backend", "nccl")], "model.dtype", "CPU only"),
    ([("ray.num_cpus", 1)], "ray.num_cpus", "at least 2"),
    ([("ray.address", "host:6379"), ("ray.num_cpus", 8)], "ray.num_cpus", "only a private instance"),
    ([("trainer.optimizer.min_lr", 1.0)], "trainer.optimizer.min_lr", "at most"),
    ([("trainer.optimizer.betas", [0.9, 1.0])], "trainer.optimizer.betas", "[0, 1)"),
    ([("trainer.optimizer.decay_steps", 5)], "trainer.optimizer.decay_steps", "does not decay"),
    (
        [("trainer.optimizer", {"schedule": "linear", "decay_steps": 5, "warmup_steps": 5})],
        "trainer.optimizer.decay_steps",
        "more than",
    ),
    ([("algorithm.mini_batches", 5)], "algorithm.mini_batches", "divisor of"),
    ([("algorithm.mini_batches", 32), ("trainer.ranks", 2)], "algorithm.mini_batches", "data-parallel"),
    ([("data.samples_per_prompt", 1)], "data.samples_per_prompt", "at least 2"),
    ([("data.prompts_per_step", 101)], "data.prompts_per_step", "at most data.train.size = 100"),
    ([("rollout.capture_routes", False)], "algorithm.routes.train", "capture_routes"),
    (
        [("algorithm.routes", {"train": "own", "old_logprob": "own", "compare_own_every": 2})],
        "algorithm.routes.compare_own_every",
        "expected 0",
    ),
    (
        [("algorithm.importance.truncation", 2.0), ("algorithm.old_logprobs", "rollout")],
        "algorithm.importance.truncation",
        "expected null",
    ),
    (
        [("algorithm.importance.band", [0.5, 5.0]), ("algorithm.old_logprobs", "rollout")],
        "algorithm.importance.band",
        "came [0.5, 5.0]",
    ),
    ([("algorithm.importance.band", [2, 1])], "algorithm.importance.band", "0 <= low < high"),
    ([("algorithm.importance.level", "sequence")], "algorithm.importance.level", "nothing is weighed"),
    (
        [("algorithm.advantage", "rloo"), ("data.samples_per_prompt", 1)],
        "data.samples_per_prompt",
        "rloo compares samples",
    ),
    ([("algorithm.advantage", "reinforce++"), ("stream.pipelining", True)], "algorithm.advantage", "is whitened"),
    ([("algorithm.loss", "ppo_sequence")], "algorithm.aggregation", "count lengths twice"),
    (
        [("algorithm", {"loss": "ppo_sequence", "aggregation": "sequence_mean", "advantage": "reinforce++"})],
        "algorithm.loss",
        "an advantage of its own",
    ),
    ([("algorithm", {"loss": "cispo", "dual_clip": 3.0})], "algorithm.dual_clip", "only ppo_clip"),
    ([("algorithm.kl", {"weighted": True, "estimator": "k2"})], "algorithm.kl.weighted", "k1 and k3"),
    ([("algorithm.kl", {"weighted": True, "in": "reward"})], "algorithm.kl.weighted", "in the reward"),
    ([("algorithm.preset", "dapo"), ("run.steps", None)], "algorithm.dynamic_sampling.enabled", "set run.steps"),
    ([("algorithm.preset", "dapo"), ("stream.staleness", 1)], "algorithm.dynamic_sampling.enabled", "under way"),
    ([("algorithm.preset", "dapo"), ("stream.pipelining", True)], "algorithm.dynamic_sampling.enabled", "groups train"),
    ([("algorithm.preset", "dapo"), ("fuse.tail.enabled", True)], "algorithm.dynamic_sampling.enabled", "fuse.tail"),
    (
        [("algorithm.preset", "dapo"), ("reward.model", {"path": "m"})],
        "algorithm.dynamic_sampling.enabled",
        "remove reward.model",
    ),
    (
        [("algorithm.preset", "dapo"), ("data.samples_per_prompt", 1)],
        "algorithm.dynamic_sampling.enabled",
        "to 2 or more",
    ),
    ([("algorithm.overlong.buffer", 257)], "algorithm.overlong.buffer", "at most sampling.max_tokens = 256"),
    (
        [("algorithm.overlong.filter", True), ("sampling.forced_lengths", {"median": 9.0})],
        "algorithm.overlong.filter",
        "cuts off every response",
    ),
    *[
        ([("algorithm", changes), ("stream.pipelining", True)], f"algorithm.{path}", "arrive one by one")
        for changes, path in [
            ({"preset": "gspo"}, "loss"),
            ({"preset": "dr_grpo"}, "aggregation"),
            ({"dual_clip": 3.0}, "dual_clip"),
            ({"kl": {"weighted": True}}, "kl.weighted"),
            ({"importance": {"band": [0.5, 5.0], "level": "sequence"}}, "importance.band"),
            ({"importance": {"truncation": 2.0, "level": "sequence"}}, "importance.level"),
        ]
    ],
    ([("algorithm.advantage", "gae")], "algorithm.advantage", "no section `critic`"),
    ([("critic", {})], "critic", "advantage: gae"),
    ([*PPO, ("stream.pipelining", True)], "algorithm.gae.whiten", "set whiten: false"),
    ([*PPO, ("critic.warmup_steps", 3)], "critic.warmup_steps", "fewer than run.steps = 3"),
    (
        [*PPO, ("trainer.ranks", 2), ("critic.parallel", {"pp": 2, "vpp": 2})],
        "critic.parallel.vpp",
        "not tested with virtual",
    ),
    ([*PPO, ("critic.parallel", {"pp": 2})], "critic.parallel", "at least etp*ep*pp = 2"),
    ([*PPO, ("critic.optimizer", {"min_lr": 1.0})], "critic.optimizer.min_lr", "at most critic.optimizer.lr"),
    ([*PPO, ("critic.recompute", "selective")], "critic.recompute_modules", "came none"),
    (
        [*PPO, *EP4, ("balance.enabled", True), ("critic.parallel", {"tp": 2, "ep": 2, "etp": 2})],
        "critic.parallel.etp",
        "keep experts whole",
    ),
    ([("reference.parallel", {})], "reference.parallel", "no reference model"),
    ([("reward.model", {"path": "m", "parallel": {"pp": 2}})], "reward.model.parallel", "at least etp*ep*pp = 2"),
    ([("stream.pipelining", True), ("algorithm.epochs_per_batch", 2)], "algorithm.epochs_per_batch", "as they arrive"),
    ([("stream.pipelining", True), ("algorithm.mini_batches", 2)], "algorithm.old_logprobs", "rollout"),
    (
        [("stream.staleness", 1), *EP4, ("balance", {"enabled": True, "reorder": True, "node_size": 2})],
        "balance.reorder_by",
        "previous",
    ),
    ([("stream", {"colocated": True, "staleness": 1})], "stream.colocated", "take turns"),
    ([("trainer", {"ranks": 4, "ranks_per_node": 3})], "trainer.ranks_per_node", "a divisor of trainer.ranks = 4"),
    (
        [("trainer", {"ranks": 4, "ranks_per_node": 2}), ("stream.colocated", True)],
        "trainer.ranks_per_node",
        "fills nodes GPU by GPU",
    ),
    ([("stream.dispatch", "longest_first")], "stream.predictor", "predicted lengths"),
    ([("stream.transfer", "nccl")], "stream.transfer", "between GPUs"),
    ([("profile", {"steps": [2], "tool": "nsys"}), ("trainer.backend", "nccl")], "profile.tool", "nsys is not tested"),
    ([("stream", {"transfer": "ipc"})], "stream.transfer", "each beside its own"),
    ([("trainer.fuse_gradients", True)], "trainer.fuse_gradients", "need GPUs"),
    ([("trainer.permute_fusion", True)], "trainer.permute_fusion", "need GPUs"),
    ([("trainer.overlap", True), ("stream.pipelining", True)], "trainer.overlap", "reduced once"),
    (
        [("stream", {"transfer": "ipc", "colocated": True}), ("trainer.ranks", 2), ("rollout.engines", 3)],
        "stream.transfer",
        "as many as trainer ranks",
    ),
    (
        [("stream", {"transfer": "ipc", "colocated": True}), ("trainer.ranks", 1), ("rollout.device", "cuda")],
        "stream.transfer",
        "which this run is not",
    ),
    ([("rollout.tensor_parallel", 4)], "rollout.tensor_parallel", "more than 2 ranks are not tested on cpu"),
    (
        [("rollout.tensor_parallel", 4), ("rollout.device", "cuda")],
        "rollout.tensor_parallel",
        "more than 2 ranks are not tested on cuda",
    ),
    ([("rollout.tensor_parallel", 2), ("stream.colocated", True)], "rollout.tensor_parallel", "shares one GPU"),
    (
        [
            ("stream", {"transfer": "ipc", "colocated": True}),
            ("rollout", {"tensor_parallel": 2, "device": "cuda"}),
            ("trainer.backend", "nccl"),
            ("allow_untested", True),
        ],
        "stream.transfer",
        "engines of one rank",
    ),
    ([("stream", {"transfer": "gloo", "staleness": 1})], "stream.transfer", "in_flight"),
    ([("stream", {"transfer": "gloo", "elastic": {"max_engines": 2}})], "stream.transfer", "elastic"),
    ([("stream", {"dispatch": "skew_aware", "predictor": "history"})], "stream.latency_profile", "measure_latency"),
    ([("stream.elastic", {"max_engines": 1}), ("rollout.engines", 2)], "stream.elastic.max_engines", "at least"),
    ([("stream", {"colocated": True, "elastic": {"max_engines": 2}})], "stream.elastic.max_engines", "each trainer"),
    ([*PPO, ("fuse.training.mode", "on")], "fuse.training.mode", "no bubbles"),
    ([("fuse.tail.enabled", True), ("stream.staleness", 1)], "fuse.tail.enabled", "no tail to fill"),
    (
        [("fuse.tail.enabled", True), ("algorithm.old_logprobs", "rollout")],
        "fuse.tail.enabled",
        "no pass to run",
    ),
    ([("fuse.tail.enabled", True), ("stream.colocated", True)], "rollout.engines", "never freed"),
    (
        [("fuse.tail.enabled", True), ("stream.colocated", True), ("rollout.engines", 2)],
        "stream.latency_profile",
        "chosen by simulation",
    ),
    ([*TAIL_ON_GPUS, ("trainer.parallel.ep", 4)], "fuse.tail.enabled", "lcm(tp, etp*ep) * pp = 4 ranks"),
    ([*TAIL_ON_GPUS, ("balance.enabled", True)], "fuse.tail.enabled", "balancing does not know"),
    ([("data.train", {"jsonl": "a.jsonl"}), ("warmup.steps", 3)], "warmup.steps", "expected 0"),
    ([("warmup", {"steps": 1, "answer_template": "x"})], "warmup.answer_template", "{answer}"),
    ([("warmup", {"steps": 1, "learn": "text", "stop_at_accuracy": 0.5})], "warmup.stop_at_accuracy", "expected null"),
    ([("profile.engines", True)], "profile.engines", "profile.steps names none"),
    ([("profile.steps", [0, 2])], "profile.steps", "counted from 1"),
    ([("profile.steps", [2, 2])], "profile.steps", "different iterations"),
    ([("profile.steps", [3, 4])], "profile.steps", "run.steps = 3"),
    ([("profile", {"steps": [2], "ranks": [1]})], "profile.ranks", "0 to 0"),
    ([("profile", {"steps": [2], "ranks": []})], "profile.ranks", "null for all"),
    ([("profile", {"steps": [2], "tool": "nsys"})], "profile.tool", "set tool to torch"),
    (
        [
            ("profile", {"steps": [2], "tool": "nsys", "stacks": True}),
            ("trainer.backend", "nccl"),
            ("allow_untested", True),
        ],
        "profile.stacks",
        "only the torch profiler",
    ),
    ([("data.eval", None), ("evaluation.every", 3)], "evaluation.every", "data.eval"),
    ([("data.eval", None), ("evaluation.success.after_min", 0.6)], "evaluation.success.after_min", "data.eval"),
    ([("evaluation.prompts", 51)], "evaluation.prompts", "at most data.eval.size = 50"),
    (
        [("evaluation.success.before_max", 0.3), ("evaluation.at_start", False)],
        "evaluation.success.before_max",
        "at_start",
    ),
]


@pytest.mark.parametrize(("changes", "path", "said"), BROKEN)
def test_broken_rules(changes, path, said):
    found = violations(*changes)
    assert path in found
    assert said in found[path]
    assert found[path].endswith((".", ")"))


VALID = [
    *[[("algorithm.preset", name)] for name in PRESETS if name != "ppo"],
    [("algorithm.preset", "ppo"), ("critic", {}), ("data.samples_per_prompt", 1)],
    [("algorithm.preset", "reinforce++"), ("data.samples_per_prompt", 1)],
    [("algorithm.preset", "dapo"), ("algorithm.dynamic_sampling.enabled", False), ("stream.pipelining", True)],
    [("algorithm.importance", {"band": [0, 5], "level": "sequence_mean"})],
    [("algorithm.dual_clip", 3.0), ("algorithm.overlong", {"buffer": 256, "filter": True})],
    [*PPO, ("data.samples_per_prompt", 1), ("critic.warmup_steps", 2)],
    [*PPO, ("trainer.ranks", 4), ("critic.parallel", {"pp": 2, "ep": 2}), ("algorithm.gae.lam", 0.95)],
    [*PPO, ("stream.pipelining", True), ("algorithm.gae.whiten", False)],
    [("algorithm.kl.coef", 0.1), ("trainer.ranks", 2), ("reference.parallel", {"pp": 2})],
    [("reward.model", {"path": "models/reward", "weight": 0.5})],
    [("fuse.tail.enabled", True)],
    TAIL_ON_GPUS,
    TWO_TP,
    [("trainer.ranks", 8), ("trainer.parallel", {"tp": 2, "pp": 2, "ep": 2}), ("trainer.sequence_parallel", True)],
    [("trainer.ranks", 2), ("trainer.parallel", {"pp": 2, "vpp": 2})],
    [("trainer.ranks", 2), ("trainer.parallel.ep", 2), ("balance.enabled", True)],
    [*EP4, ("balance", {"enabled": True, "node_size": 2, "foresight": True, "reorder": True, "compose": True})],
    [*EP4, ("balance", {"enabled": True, "foresight": True}), ("algorithm.routes.old_logprob", "own")],
    [("profile", {"steps": [1, 3], "ranks": None, "engines": True, "shapes": True})],
    [("profile", {"steps": [2], "tool": "nsys"}), ("trainer.backend", "nccl"), ("allow_untested", True)],
    [("data.eval.seed", 100)],
    [("stream", {"staleness": 2, "pipelining": True, "in_flight": "continue"})],
    [("stream", {"pipelining": True}), ("algorithm", {"mini_batches": 2, "old_logprobs": "rollout"})],
    [("stream", {"dispatch": "longest_first", "predictor": "history", "elastic": {"max_engines": 2}})],
    [("stream", {"colocated": True})],
    [("stream", {"transfer": "ipc", "colocated": True}), ("trainer.ranks", 2), ("rollout.engines", 2)],
    [
        ("stream", {"transfer": "ipc", "colocated": True}),
        ("rollout", {"engines": 2, "device": "cuda"}),
        ("trainer", {"ranks": 2, "backend": "nccl"}),
    ],
    [("stream.transfer", "nccl"), ("rollout.device", "cuda"), ("trainer.backend", "nccl")],
    [("profile", {"steps": [2]}), ("trainer.backend", "nccl")],
    [("trainer", {"backend": "nccl", "overlap": True, "fuse_gradients": True, "permute_fusion": True})],
    [*PPO, ("trainer.backend", "nccl")],
    [("data.eval", {"reasoning_gym": "leg_counting", "size": 50, "seed": 0})],
    [("warmup", {"steps": 10, "batch_size": 10, "examples_seed": 900})],
    [("warmup", {"steps": 1000, "batch_size": 10, "examples": 100, "examples_seed": 900})],
    [("data.samples_per_prompt", 1), ("algorithm.zero_advantages", True)],
    [("rollout.capture_routes", False), ("algorithm.routes", {"train": "own", "old_logprob": "own"})],
    [("algorithm.importance.truncation", 2.0)],
    [("evaluation.success", {"before_max": 0.3, "after_min": 0.6})],
    [("trainer.recompute", "selective"), ("trainer.recompute_modules", ["core_attn", "moe"])],
    [("model.dtype", "float64")],
    [("rollout.tensor_parallel", 2)],
    [("rollout.tensor_parallel", 8), ("rollout.device", "cuda"), ("allow_untested", True)],
    [("trainer.tokens_per_micro_batch", 767), ("rollout.max_model_len", 768)],
]


@pytest.mark.parametrize("changes", VALID)
def test_valid_combinations(changes):
    from_dict(changed(*changes))


def test_every_rule_is_broken_by_some_case_above():
    def broken_by(rule):
        for changes, _, _ in BROKEN:
            config = RunConfig.model_validate(changed(*changes))
            if any(True for _ in rule(config)):
                return True
        return False

    assert [rule.__name__ for rule in RULES if not broken_by(rule)] == []


def test_float64_engines_run_in_float32():
    assert from_dict(changed(("model.dtype", "float64"))).engine_dtype == "float32"
    untested = changed(("model.dtype", "bfloat16"), ("allow_untested", True))
    assert from_dict(untested).engine_dtype == "bfloat16"
    with pytest.raises(ConfigError, match="bfloat16 engines on CPUs are not tested"):
        from_dict(changed(("model.dtype", "bfloat16")))
    assert from_dict(changed(("model.dtype", "bfloat16"), ("rollout.dtype", "float32"))).engine_dtype == "float32"


def test_importance_is_corrected_where_samples_may_be_stale():
    assert from_dict(changed()).importance_cap is None
    assert from_dict(changed(("stream.staleness", 1))).importance_cap == 2.0
    assert from_dict(changed(("stream.staleness", 1), ("algorithm.importance.truncation", None))).importance_cap is None
    assert from_dict(changed(("stream.staleness", 1), ("algorithm.old_logprobs", "rollout"))).importance_cap is None
    assert from_dict(changed(("algorithm.importance.truncation", 3.0))).importance_cap == 3.0
