"""The data plane: tasks, chats, sampling, the sample store, diversity, pairs, resampling."""
