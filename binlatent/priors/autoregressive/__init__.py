"""The autoregressive prior: a token after the other, in raster order."""
