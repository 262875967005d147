"""Image datasets (TFDS, folders, LMDB), transforms, cached codes and the Grain pipeline."""
