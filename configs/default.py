"""The paper's unconditional 256x256 setting: 16x16 tokens of 32 bits, a prior of 24 x 512.

Every other config starts from this one and lists what differs. Not meant to be run as it is: a
dataset is chosen by `config.data.name` (a TFDS name, or "folder") and `config.data.path` (the
folder, or TFDS's data_dir).
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the defaults."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.dtype = "float32"  # or "bfloat16": compute; parameters and losses stay float32

    config.data = data = ml_collections.ConfigDict()
    data.name = "folder"
    data.path = ""
    data.image_size = 256
    data.channels = 3
    data.num_classes = -1  # -1: what the dataset has; 0: ignore its labels

    # Levels from the image inwards; see binlatent/models/autoencoder.py.
    config.autoencoder = autoencoder = ml_collections.ConfigDict()
    autoencoder.num_bits = 32
    autoencoder.widths = (128, 128, 256, 256, 512)
    autoencoder.factors = (1, 2, 2, 2, 2)
    autoencoder.attention = (False, False, False, False, True)
    autoencoder.num_blocks = 2
    autoencoder.train = ml_collections.ConfigDict()
    autoencoder.train.batch_size = 8
    autoencoder.train.num_steps = 1_000_000
    autoencoder.train.learning_rate = 5e-4
    autoencoder.train.warmup_steps = 10_000
    autoencoder.train.decay = "constant"  # or "cosine", to 0 at num_steps
    autoencoder.train.max_grad_norm = 1.0
    autoencoder.train.ema_decay = 0.9999

    config.prior = prior = ml_collections.ConfigDict()
    prior.width = 512
    prior.num_layers = 24
    prior.num_heads = 8
    prior.num_timesteps = 64
    prior.continuous = False  # train on all times in (0, T], not on 1..T alone
    prior.schedule = "linear"  # or "cos", "sigmoid", "given"
    prior.keep = ()  # k_0..k_T of the schedule "given"
    prior.target = "flip"  # or "z_0", "z_s": what the network predicts (Table 7)
    prior.pair = "plain_mixture"  # or "balanced_plugin", as the authors' released priors
    prior.evidence = True  # flip logit = network output + log(b_t / (1 - b_t))
    prior.vlb_weight = 0.1  # lambda of (13); the target "z_s" has L_vlb alone
    prior.time_weight = "mean"  # or "falling", 1 - (t - 1)/T
    prior.stratified = False  # spread a batch's times evenly
    prior.label_dropout = 0.1
    prior.cache_codes = False  # encode the training set once, to workdir/codes
    prior.train = ml_collections.ConfigDict()
    prior.train.batch_size = 32
    prior.train.num_steps = 1_000_000
    prior.train.learning_rate = 1e-4
    prior.train.warmup_steps = 10_000
    prior.train.decay = "constant"
    prior.train.max_grad_norm = 1.0
    prior.train.ema_decay = 0.9999

    config.sample = sample = ml_collections.ConfigDict()
    sample.steps = 64
    sample.temperature = 0.9
    sample.guidance = 0.0
    sample.guidance_shape = "constant"  # or "linear", "cosine", "power": rising from 0 at t = T
    sample.guidance_power = 1.0  # of the shape "power"
    sample.guidance_interval = (0.0, 1.0)  # in t/T; no guidance outside
    sample.pair = "trained"  # or one of prior.pair's: what the temperature acts on
    sample.threshold_last = False  # the last step rounds the prediction instead of drawing it
    sample.corrector_steps = 0  # after each step, each a network call
    sample.corrector_size = 0.1  # share of bits that a corrector step draws anew
    sample.known = "kept"  # or "noised": inpainting's known bits on the way
    sample.keep_pixels = True  # inpainting's known pixels come back as they were
    sample.batch_size = 50

    config.evaluate = evaluate = ml_collections.ConfigDict()
    evaluate.num_images = 1_000  # of the test split, at most
    evaluate.num_samples = 1_000
    evaluate.bound_draws = 1  # of noise a step, for the likelihood bound of a test code
    evaluate.classifier_images = 10_000  # of the training split, at most, for its classifier

    config.log_every = 100
    config.evaluate_every = 10_000  # with a preview in workdir/figures
    config.checkpoint_every = 5_000
    config.keep_checkpoints = 3
    return config.lock()
