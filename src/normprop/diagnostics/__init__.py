"""What a network's layers do to signals and gradients: one file for each question, each a function and its plots."""
