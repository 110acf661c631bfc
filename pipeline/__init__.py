"""The data plane: tasks, chat rendering, sampling, the sample store, diversity, pairs, resampling."""
