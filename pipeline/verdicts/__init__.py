"""What an answer is worth: by its gold answer, a function, unit tests in a sandbox, or a judge."""
