"""The Bernoulli diffusion as plain functions: no module, no parameter, no key but the caller's."""
