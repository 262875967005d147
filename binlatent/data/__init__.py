"""Sources of images (TFDS and folders), transforms and the Grain pipeline."""
