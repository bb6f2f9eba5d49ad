"""One video over several ranks: sequence parallelism inside a stage, steps over stages, a rank for the VAE."""
