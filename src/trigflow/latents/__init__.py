"""From images to latents and back, with an autoencoder of diffusers (`pip install "trigflow[latents]"`)."""

from trigflow.latents.encode import encode_images
from trigflow.latents.vae import VAE

__all__ = ["VAE", "encode_images"]
