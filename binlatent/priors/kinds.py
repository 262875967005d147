"""The kinds of prior, by the value of config.prior.kind; users add their own to this table."""

from binlatent.priors.absorbing.prior import AbsorbingPrior
from binlatent.priors.autoregressive.prior import AutoregressivePrior
from binlatent.priors.bernoulli.prior import BernoulliPrior
from binlatent.priors.prior import Prior

KINDS: dict[str, type[Prior]] = {
    "bernoulli": BernoulliPrior,
    "absorbing": AbsorbingPrior,
    "autoregressive": AutoregressivePrior,
}
