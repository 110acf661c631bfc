"""The ground: configuration, the run folder and its storage, the Ray session, plan and progress."""
