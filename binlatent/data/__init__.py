"""Sources of images (TFDS, folders, LMDB), transforms, codes on disk and the Grain pipeline."""
