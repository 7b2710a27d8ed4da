"""The models: compositions of encoder, decoder, likelihood and prior."""

from ferrovae.models.elbo import Elbo, Objective
from ferrovae.models.vae import VAE
from ferrovae.models.vqvae import VQVAE

__all__ = ["VAE", "VQVAE", "Elbo", "Objective"]
