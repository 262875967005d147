"""The autoregressive prior, over tokens in raster order."""
