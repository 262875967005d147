"""The paper's unconditional 256x256 setting: 16x16 tokens of 32 bits, a prior of 24 x 512.

Every other config starts from this one and lists what differs. To run this one, choose a dataset:
`config.data.name` is "folder" or a TFDS name, `config.data.path` the folder or TFDS's data_dir.

The autoencoder is trained as in the paper (supplement B: Adam at 5e-4 after 10k steps of warm-up,
batches of 8, MSE + LPIPS + adversarial loss with weights of 1). `--config=configs/X.py:released`
trains it as the authors' released code does; `:modern` is the paper's with a newer prior, the
network "dit" and the target z_0 (docs/priors.md).

The default of a new key must keep the behaviour without that key: a checkpoint that was written
without it gets the default.
"""

import ml_collections


def get_config(variant: str = "paper") -> ml_collections.ConfigDict:
    """Returns the defaults of a variant, "paper", "released" or "modern"."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.dtype = "float32"  # or "bfloat16", to compute in; parameters and losses stay float32

    config.data = data = ml_collections.ConfigDict()
    data.name = "folder"
    data.path = ""
    data.image_size = 256
    data.channels = 3
    data.table = ""  # a .csv or .jsonl file in the folder, of file, label, caption, text, split
    data.texts = False  # labels are features of texts, in a .npy file beside each image
    data.crop = "centre"  # or "random": in training, along the longer side
    data.flip = False  # mirror training images at random, half of them
    data.max_broken = 0.01  # largest share of images that may be unreadable
    data.num_classes = -1  # -1: as many as the dataset has; 0: ignore its labels

    config.texts = texts = ml_collections.ConfigDict()  # captions and prompts; see docs/text.md
    texts.encoder = ""  # "minilm" or "clip"
    texts.weights = ""  # its file; "": ENCODER.npz, written by `python -m binlatent.convert`
    texts.sha256 = ""  # of that file; "": any file, whose hash the checkpoint then stores

    config.autoencoder = autoencoder = ml_collections.ConfigDict()
    autoencoder.bottleneck = "binary"  # or "vq", "real": for Table 4, without a prior
    autoencoder.num_bits = 32  # c, bits per token; for "binary"
    autoencoder.codebook_size = 1024  # for "vq"
    autoencoder.codebook_width = 4  # width of a codebook vector; for "vq"
    autoencoder.num_channels = 16  # c; for "real"
    autoencoder.variational = True  # draw the channels from a Gaussian; for "real"
    autoencoder.deterministic = False  # take bits as y > 0.5 instead of drawing them
    autoencoder.signed = False  # embed bits as -1 and 1; y comes from a tanh
    # Levels from the image inwards; see binlatent/autoencoder/modules.py.
    autoencoder.base_width = 128
    autoencoder.multipliers = (1, 1, 2, 2, 4)  # per level; sides halve between levels: k = 16
    autoencoder.patch = 1  # side in pixels of the blocks that first become channels
    autoencoder.refine_width = 0  # of two last convolutions on pixels, if patch > 1; 0: none
    autoencoder.num_blocks = 2  # per level
    autoencoder.decoder_depth = 1.0  # the decoder has int(num_blocks * decoder_depth) per level
    autoencoder.attention_resolutions = (16,)  # sides of the grids with attention
    autoencoder.embedding_width = 256
    autoencoder.norm_first = False  # normalise the decoder's input
    autoencoder.remat = False  # recompute activations: less memory for a third more time
    autoencoder.loss = ml_collections.ConfigDict()  # weights; a loss of weight 0 is not computed
    autoencoder.loss.mse = 1.0
    autoencoder.loss.l1 = 0.0
    autoencoder.loss.perceptual = 1.0  # LPIPS
    autoencoder.loss.vgg16 = "vgg16.npz"  # for LPIPS; `python -m binlatent.convert vgg16` writes it
    autoencoder.loss.adversarial = 1.0
    autoencoder.loss.adaptive = False  # weight by the ratio of gradients, at most `adversarial`
    autoencoder.loss.start_step = 0  # of the adversarial loss and the discriminator
    autoencoder.loss.r1 = 0.0  # weight of the discriminator's gradient penalty
    autoencoder.loss.entropy = 0.0  # makes bits certain per image and balanced over the batch
    autoencoder.loss.commitment = 0.25  # for "vq"
    autoencoder.loss.kl = 1e-6  # for "real", if variational; a mean over channels
    autoencoder.discriminator = ml_collections.ConfigDict()  # PatchGAN
    autoencoder.discriminator.width = 64
    autoencoder.discriminator.num_layers = 3
    autoencoder.discriminator.norm = "batch"  # or "group", for small batches
    autoencoder.discriminator.augment = ()  # any of "colour", "translation"
    autoencoder.discriminator.learning_rate_ratio = 1.0  # to the autoencoder's
    autoencoder.train = ml_collections.ConfigDict()
    autoencoder.train.batch_size = 8
    autoencoder.train.num_steps = 1_000_000
    autoencoder.train.learning_rate = 5e-4
    autoencoder.train.warmup_steps = 10_000
    autoencoder.train.decay = "constant"  # or "cosine", to 0 at num_steps
    autoencoder.train.max_grad_norm = 1.0
    autoencoder.train.ema_decay = 0.9999
    autoencoder.train.accumulate = 1  # parts of a batch, computed one after the other

    config.prior = prior = ml_collections.ConfigDict()
    prior.kind = "bernoulli"  # or "absorbing", "autoregressive": see the sections below
    prior.network = ml_collections.ConfigDict()
    prior.network.width = 512
    prior.network.num_layers = 24
    prior.network.num_heads = 8
    # The authors' network; or "dit", see docs/priors.md. Autoregression has its own.
    prior.network.name = "released"
    prior.network.dit = ml_collections.ConfigDict()  # for "dit"
    prior.network.dit.adaln = True  # time and label modulate norms; False: they are tokens
    prior.network.dit.qk_norm = True  # RMS norms of queries and keys
    prior.network.dit.swiglu = True  # SwiGLU MLPs, with as many parameters
    prior.network.dit.positions = "rotary"  # rotary and learned ones; or "learned" alone
    prior.bernoulli = bernoulli = ml_collections.ConfigDict()
    bernoulli.num_timesteps = 64
    bernoulli.continuous = False  # train on all times in (0, T] instead of 1..T
    bernoulli.schedule = "linear"  # or "cos", "sigmoid", "given"
    bernoulli.keep = ()  # k_0..k_T, for the schedule "given"
    bernoulli.target = "flip"  # or "z_0", "z_s": what the network predicts (Table 7)
    bernoulli.pair = "plain_mixture"  # or "balanced_plugin", as in the authors' released priors
    bernoulli.evidence = True  # flip logit = network output + log(b_t / (1 - b_t))
    bernoulli.vlb_weight = 0.1  # lambda of (13); the target "z_s" uses L_vlb alone
    bernoulli.time_weight = "mean"  # or "falling", 1 - (t - 1)/T
    bernoulli.stratified = False  # spread the times of a batch evenly
    prior.absorbing = absorbing = ml_collections.ConfigDict()
    absorbing.unit = "token"  # or "bit", or "8": bits that are hidden together
    absorbing.schedule = "linear"  # or "cos", "sigmoid", "given"; 1 - k is the share hidden
    absorbing.keep = ()  # k_0..k_T, for the schedule "given"
    absorbing.time_weight = "bound"  # or "falling", 1 - t/T
    prior.autoregressive = autoregressive = ml_collections.ConfigDict()
    autoregressive.head = "joint"  # or "independent": a token's bits given the tokens before
    autoregressive.group = 8  # for "joint": bits per softmax, over the 2^group values
    prior.condition = "class"  # if the data has classes; or "text_token", "text_cross"
    prior.text_width = 0  # of text features; 0: as the encoder or the features have it
    prior.label_dropout = 0.1  # share of labels dropped in training, for guidance
    prior.cache_codes = False  # encode the training set once, to workdir/codes
    prior.codes = ""  # or a folder of codes to train on, made elsewhere
    prior.train = ml_collections.ConfigDict()
    prior.train.batch_size = 32
    prior.train.num_steps = 1_000_000
    prior.train.learning_rate = 1e-4
    prior.train.warmup_steps = 10_000
    prior.train.decay = "constant"
    prior.train.max_grad_norm = 1.0
    prior.train.ema_decay = 0.9999
    prior.train.accumulate = 0  # as for the autoencoder; 0: chosen from the number of cores

    config.sample = sample = ml_collections.ConfigDict()
    sample.steps = 64
    sample.temperature = 0.9
    sample.guidance = 0.0
    sample.guidance_interval = (0.0, 1.0)  # in t/T; no guidance outside
    sample.pair = "trained"  # or a value of prior.bernoulli.pair: what the temperature acts on
    sample.threshold_last = False  # the last step rounds the prediction instead of drawing it
    sample.corrector_steps = 0  # after each step; each is one network call
    sample.corrector_size = 0.1  # share of bits that a corrector step draws anew
    sample.renoise = 0.0  # in [0, 1): share of bits that each step draws anew from its prediction
    sample.known = "kept"  # or "noised": known bits of inpainting at t > 0
    sample.keep_pixels = True  # return the known pixels of inpainting unchanged
    sample.batch_size = 16  # images at a time, over all devices
    # For prior.kind "absorbing" only, where `steps` are network calls, at most one per unit.
    sample.guidance_schedule = "constant"  # or "rising", from 0
    sample.order = "random"  # or "confidence": which units a call keeps
    sample.score = "certainty"  # or "likelihood"; for the order "confidence"
    sample.order_temperature = 1.0  # of the Gumbel noise in that order; it falls to 0
    sample.revise = False  # in that order, hide the least certain units again

    config.evaluate = evaluate = ml_collections.ConfigDict()
    evaluate.num_images = 1_000  # of the test split, at most
    evaluate.num_samples = 1_000
    evaluate.bound_draws = 1  # of noise per step, for the likelihood bound of a test code
    evaluate.classifier_images = 10_000  # of the training split, at most, for its classifier
    evaluate.network = "inception"  # or "efficientnet", "classifier": whose features are compared
    evaluate.weights = ""  # its file; "": NETWORK.npz, written by `python -m binlatent.convert`
    evaluate.reference = "train"  # or "test", a folder, an .npz file of images or statistics
    evaluate.labels = "balanced"  # of samples: classes in turn; or "data": as in training images
    evaluate.every = 0  # steps of the prior between measurements of `metrics`; 0: none
    evaluate.metrics = ("fid",)  # measured every `every` steps, on num_samples samples
    evaluate.cas_epochs = 90  # of the classifier that trains on samples (CAS)
    evaluate.cas_batch_size = 256

    config.log_every = 100
    config.preview_every = 10_000  # loss on test images, and a picture in workdir/figures
    config.checkpoint_every = 5_000
    config.keep_checkpoints = 3
    config.on_nonfinite = "stop"  # or "skip": for a step with a NaN or infinite loss or gradient
    config.debug_nans = False  # jax_debug_nans: slow, but names the operation that made a NaN
    if variant == "released":
        autoencoder.norm_first = True
        autoencoder.loss.mse, autoencoder.loss.l1 = 0.0, 1.0
        autoencoder.loss.adaptive = True
        autoencoder.loss.start_step = 400_001
        # Eight GPUs with 4 images each; the rate is 4.5e-6 times the images per GPU.
        autoencoder.train.batch_size = 32
        autoencoder.train.learning_rate = 1.8e-5
        autoencoder.train.warmup_steps = 0
        autoencoder.train.max_grad_norm = 1e6  # no clipping
        autoencoder.train.ema_decay = 0.9995  # the authors: 0.995 every ten steps
    elif variant == "modern":
        prior.network.name = "dit"
        prior.bernoulli.target = "z_0"
    elif variant != "paper":
        raise ValueError(f"the variant must be :paper, :released or :modern, not :{variant}")
    return config.lock()
