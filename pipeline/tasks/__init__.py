"""The problems to distil on: a file a task, the prompt they share, the loading of their data."""

from pipeline.tasks.catalogue import TASKS
from pipeline.tasks.loading import load_prompts
from pipeline.tasks.message import instruct, user_message, worked_examples

__all__ = ["TASKS", "instruct", "load_prompts", "user_message", "worked_examples"]
