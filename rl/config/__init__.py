"""A run's configuration: one typed YAML file, overrides ``a.b=c``, all violations reported at once.

config = load("recipes/smoke.yaml", ["run.seed=1", "trainer.parallel.ep=2"])
config.trainer.optimizer.lr
print(to_yaml(config))
"""

from rl.config.algorithm import (
    AlgorithmSection,
    DynamicSamplingSection,
    GAESection,
    ImportanceSection,
    KLSection,
    OverlongSection,
    RoutesSection,
)
from rl.config.data import DataSection, EvaluationSection, RewardSection, SourceSection, SuccessSection
from rl.config.loading import ConfigError, describe, field_paths, from_dict, load, to_dict, to_yaml
from rl.config.profile import ProfileSection
from rl.config.rules import Violation
from rl.config.sections import (
    CheckpointSection,
    Limits,
    LoggingSection,
    ModelSection,
    RaySection,
    RolloutSection,
    RunConfig,
    RunSection,
    SamplingSection,
    WarmupSection,
)
from rl.config.trainer import (
    CriticSection,
    OptimizerSection,
    ParallelSection,
    ReferenceSection,
    RewardModelSection,
    TrainerSection,
)

__all__ = [
    "AlgorithmSection",
    "CheckpointSection",
    "ConfigError",
    "CriticSection",
    "DataSection",
    "DynamicSamplingSection",
    "EvaluationSection",
    "GAESection",
    "ImportanceSection",
    "KLSection",
    "Limits",
    "LoggingSection",
    "ModelSection",
    "OptimizerSection",
    "OverlongSection",
    "ParallelSection",
    "ProfileSection",
    "RaySection",
    "ReferenceSection",
    "RewardModelSection",
    "RewardSection",
    "RolloutSection",
    "RoutesSection",
    "RunConfig",
    "RunSection",
    "SamplingSection",
    "SourceSection",
    "SuccessSection",
    "TrainerSection",
    "Violation",
    "WarmupSection",
    "describe",
    "field_paths",
    "from_dict",
    "load",
    "to_dict",
    "to_yaml",
]
