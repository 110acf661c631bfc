"""The problems to distil on: one file a task, the prompt they share, and the loading of their data."""

from pipeline.tasks.catalogue import TASKS
from pipeline.tasks.loading import load_prompts
from pipeline.tasks.message import instruct, user_message

__all__ = ["TASKS", "instruct", "load_prompts", "user_message"]
