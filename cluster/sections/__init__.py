"""The sections of a run's configuration: every option, its default, and a sentence on it."""

from cluster.sections.base import (
    EXECUTION,
    Dtype,
    Execution,
    NonNegativeFloat,
    ReadBy,
    Section,
    Share,
)
from cluster.sections.models import Endpoint, FewShot, Model, Teacher
from cluster.sections.run import Cluster, Nodes, Run
from cluster.sections.sampling import Engines, Pairs, Sampling, Scoring
from cluster.sections.serving import Evaluation, Serving
from cluster.sections.task import AnyVerdict, FunctionVerdict, JudgeVerdict, Task, UnitTestsVerdict
from cluster.sections.training import Lora, Training

__all__ = [
    "EXECUTION",
    "AnyVerdict",
    "Cluster",
    "Dtype",
    "Endpoint",
    "Engines",
    "Evaluation",
    "Execution",
    "FewShot",
    "FunctionVerdict",
    "JudgeVerdict",
    "Lora",
    "Model",
    "Nodes",
    "NonNegativeFloat",
    "Pairs",
    "ReadBy",
    "Run",
    "Sampling",
    "Scoring",
    "Section",
    "Serving",
    "Share",
    "Task",
    "Teacher",
    "Training",
    "UnitTestsVerdict",
]
