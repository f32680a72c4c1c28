"""Training rows without a store: a child process captures, the trainer takes the rows through a bounded queue."""
