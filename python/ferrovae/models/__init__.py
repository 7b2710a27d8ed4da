"""The models: compositions of encoder, decoder, likelihood and prior."""

from ferrovae.models.elbo import Elbo, Objective
from ferrovae.models.vae import VAE

__all__ = ["VAE", "Elbo", "Objective"]
