"""The mathematics: causal S2V DiT, Wan VAE, text and audio encoders, under the names of the published checkpoint."""
