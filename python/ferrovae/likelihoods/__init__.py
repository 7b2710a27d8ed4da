"""p(x|z): families of distributions over x, whose parameters a decoder gives."""

from typing import Any

from ferrovae.likelihoods.base import Factorized, Likelihood
from ferrovae.likelihoods.bernoulli import Bernoulli
from ferrovae.likelihoods.categorical import Categorical
from ferrovae.likelihoods.discretized_logistic import DiscretizedLogistic
from ferrovae.likelihoods.gaussian import Gaussian

__all__ = ["Bernoulli", "Categorical", "DiscretizedLogistic", "Factorized", "Gaussian", "Likelihood", "build"]

FAMILIES: dict[str, type[Likelihood]] = {
    family.name: family for family in (Bernoulli, Gaussian, Categorical, DiscretizedLogistic)
}


def build(likelihood: str | Likelihood, **options: Any) -> Likelihood:
    """The likelihood of that name with these options, or the given one as it is.

    `build("gaussian", sigma="learned")`; names: bernoulli, gaussian, categorical, discretized_logistic.

    Raises:
        ValueError: no such name. TypeError: options the family does not take, or for a built likelihood.
    """
    if isinstance(likelihood, Likelihood):
        if options:
            raise TypeError(f"likelihoods.build: options {sorted(options)} need a name, not a built {likelihood.name}")
        return likelihood
    if likelihood not in FAMILIES:
        raise ValueError(f"likelihoods.build: {likelihood!r} is unknown, expected one of {', '.join(FAMILIES)}")
    return FAMILIES[likelihood](**options)
