"""The distilled student, its base and its teacher on one OpenAI-style endpoint."""
