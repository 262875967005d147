"""The paper's unconditional 256x256 setting: 16x16 tokens of 32 bits, a prior of 24 x 512.

Every other config starts from this one and lists what differs. Not meant to be run as it is: a
dataset is chosen by `config.data.name` (a TFDS name, or "folder") and `config.data.path` (the
folder, or TFDS's data_dir).

The default of a key that is added is what there was without it: a checkpoint whose config lacks the
key gets it.

The autoencoder is trained as the paper says (supplement B: Adam at 5e-4 after 10k steps of
warm-up, batches of 8, MSE + LPIPS + adversarial with weights of 1).
`--config=configs/X.py:released` trains it as the authors' released code does, where that differs.
"""

import ml_collections


def get_config(variant: str = "paper") -> ml_collections.ConfigDict:
    """Returns the defaults, of the "paper" or as "released"."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.dtype = "float32"  # or "bfloat16": compute; parameters and losses stay float32

    config.data = data = ml_collections.ConfigDict()
    data.name = "folder"
    data.path = ""
    data.image_size = 256
    data.channels = 3
    data.table = ""  # of a folder: a .csv or .jsonl file of file, label, caption, text, split
    data.texts = False  # labels are texts' features, in a .npy file beside each image of a folder
    data.crop = "centre"  # or "random", along the longer side, in training
    data.flip = False  # mirror every other image in training
    data.max_broken = 0.01  # share of images that may be unreadable
    data.num_classes = -1  # -1: what the dataset has; 0: ignore its labels

    config.texts = texts = ml_collections.ConfigDict()  # of captions and prompts; docs/text.md
    texts.encoder = ""  # "minilm" or "clip"
    texts.weights = ""  # its, "" for ENCODER.npz; `python -m binlatent.convert` writes it
    texts.sha256 = ""  # of that file; "" for any, and a checkpoint then has that of the file

    config.autoencoder = autoencoder = ml_collections.ConfigDict()
    autoencoder.bottleneck = "binary"  # or "vq", "real", which have no prior (Table 4)
    autoencoder.num_bits = 32  # c, a token; of "binary"
    autoencoder.codebook_size = 1024  # of "vq"
    autoencoder.codebook_width = 4  # of its vectors
    autoencoder.num_channels = 16  # c of "real"
    autoencoder.variational = True  # channels of "real" are drawn from a Gaussian
    autoencoder.deterministic = False  # bits are y > 0.5, never drawn
    autoencoder.signed = False  # bits are embedded as -1 and 1, y is of a tanh
    # Levels from the image inwards; see binlatent/autoencoder/modules.py.
    autoencoder.base_width = 128
    autoencoder.multipliers = (1, 1, 2, 2, 4)  # a level each; halved between them: k = 16
    autoencoder.patch = 1  # pixels a side that become channels first
    autoencoder.refine_width = 0  # of two last convolutions on pixels, for a patch above 1
    autoencoder.num_blocks = 2  # a level
    autoencoder.decoder_depth = 1.0  # the decoder has int(num_blocks * decoder_depth)
    autoencoder.attention_resolutions = (16,)  # sides of grids
    autoencoder.embedding_width = 256
    autoencoder.norm_first = False  # normalise what the decoder gets
    autoencoder.remat = False  # less memory for a third more time
    autoencoder.loss = ml_collections.ConfigDict()  # weights; 0 costs nothing
    autoencoder.loss.mse = 1.0
    autoencoder.loss.l1 = 0.0
    autoencoder.loss.perceptual = 1.0  # LPIPS
    autoencoder.loss.vgg16 = "vgg16.npz"  # for it; `python -m binlatent.convert vgg16` writes it
    autoencoder.loss.adversarial = 1.0
    autoencoder.loss.adaptive = False  # at most `adversarial`, by the ratio of gradients
    autoencoder.loss.start_step = 0  # of the adversarial loss and its discriminator
    autoencoder.loss.r1 = 0.0  # of the discriminator's gradient penalty
    autoencoder.loss.entropy = 0.0  # sure bits for an image, balanced over the batch
    autoencoder.loss.commitment = 0.25  # of "vq"
    autoencoder.loss.kl = 1e-6  # of "real", if variational; a mean over channels
    autoencoder.discriminator = ml_collections.ConfigDict()  # of patches
    autoencoder.discriminator.width = 64
    autoencoder.discriminator.num_layers = 3
    autoencoder.discriminator.norm = "batch"  # or "group", for small batches
    autoencoder.discriminator.augment = ()  # of "colour", "translation"
    autoencoder.discriminator.learning_rate_ratio = 1.0  # to that of the autoencoder
    autoencoder.train = ml_collections.ConfigDict()
    autoencoder.train.batch_size = 8
    autoencoder.train.num_steps = 1_000_000
    autoencoder.train.learning_rate = 5e-4
    autoencoder.train.warmup_steps = 10_000
    autoencoder.train.decay = "constant"  # or "cosine", to 0 at num_steps
    autoencoder.train.max_grad_norm = 1.0
    autoencoder.train.ema_decay = 0.9999
    autoencoder.train.accumulate = 1  # parts of a batch, one after the other

    config.prior = prior = ml_collections.ConfigDict()
    # The paper's; or "absorbing", "autoregressive". The section of that name is its own.
    prior.kind = "bernoulli"
    prior.network = ml_collections.ConfigDict()
    prior.network.width = 512
    prior.network.num_layers = 24
    prior.network.num_heads = 8
    prior.network.name = "released"  # as the authors' weights; or "dit", docs/priors.md
    prior.network.dit = ml_collections.ConfigDict()
    prior.network.dit.adaln = True  # time and label modulate norms, in place of tokens
    prior.network.dit.qk_norm = True  # RMS norms of queries and keys
    prior.network.dit.swiglu = True  # an MLP of as many parameters
    prior.network.dit.positions = "rotary"  # beside the learned ones; or "learned", these alone
    prior.bernoulli = bernoulli = ml_collections.ConfigDict()
    bernoulli.num_timesteps = 64
    bernoulli.continuous = False  # train on all times in (0, T], not on 1..T alone
    bernoulli.schedule = "linear"  # or "cos", "sigmoid", "given"
    bernoulli.keep = ()  # k_0..k_T of the schedule "given"
    bernoulli.target = "flip"  # or "z_0", "z_s": what the network predicts (Table 7)
    bernoulli.pair = "plain_mixture"  # or "balanced_plugin", as the authors' released priors
    bernoulli.evidence = True  # flip logit = network output + log(b_t / (1 - b_t))
    bernoulli.vlb_weight = 0.1  # lambda of (13); the target "z_s" has L_vlb alone
    bernoulli.time_weight = "mean"  # or "falling", 1 - (t - 1)/T
    bernoulli.stratified = False  # spread a batch's times evenly
    bernoulli.self_conditioning = False  # an earlier estimate of z_0 is a second input
    bernoulli.groups = 1  # of a token's bits; a step draws each given those before
    prior.absorbing = absorbing = ml_collections.ConfigDict()
    absorbing.unit = "token"  # or "bit", or "8": bits that are hidden together
    absorbing.schedule = "linear"  # or "cos", "sigmoid", "given"; 1 - k is the share hidden
    absorbing.keep = ()  # k_0..k_T of the schedule "given"
    absorbing.time_weight = "bound"  # or "falling", 1 - t/T
    prior.autoregressive = autoregressive = ml_collections.ConfigDict()
    autoregressive.head = "joint"  # or "independent": bits of a token, given the tokens before
    autoregressive.group = 8  # bits of a token at a time, a softmax over their values; of "joint"
    prior.condition = "class"  # if the data has any; or "text_token", "text_cross"
    prior.text_width = 0  # of a text's features; 0: that of the encoder, or of what is prepared
    prior.label_dropout = 0.1
    prior.cache_codes = False  # encode the training set once, to workdir/codes, as --mode=encode
    prior.codes = ""  # or learn from a folder of codes that lies elsewhere
    prior.train = ml_collections.ConfigDict()
    prior.train.batch_size = 32
    prior.train.num_steps = 1_000_000
    prior.train.learning_rate = 1e-4
    prior.train.warmup_steps = 10_000
    prior.train.decay = "constant"
    prior.train.max_grad_norm = 1.0
    prior.train.ema_decay = 0.9999
    prior.train.accumulate = 0  # parts of a batch, one after the other; 0: by the cores

    config.sample = sample = ml_collections.ConfigDict()
    sample.steps = 64
    sample.temperature = 0.9
    sample.guidance = 0.0
    sample.guidance_interval = (0.0, 1.0)  # in t/T; no guidance outside
    sample.pair = "trained"  # or one of prior.bernoulli.pair's: what the temperature acts on
    sample.threshold_last = False  # the last step rounds the prediction instead of drawing it
    sample.corrector_steps = 0  # after each step, each a network call
    sample.corrector_size = 0.1  # share of bits that a corrector step draws anew
    sample.renoise = 0.0  # in [0, 1): share of bits that each step draws anew from its prediction
    sample.ddim = 0.0  # in [0, 1]: from ancestral sampling to the less random multinomial DDIM
    sample.known = "kept"  # or "noised": inpainting's known bits on the way
    # Of prior.kind "absorbing", of which `steps` are network calls, 1 to the number of units.
    sample.guidance_schedule = "constant"  # or "rising", from 0
    sample.order = "random"  # or "confidence": which units a call keeps
    sample.score = "certainty"  # or "likelihood", of the order "confidence"
    sample.order_temperature = 1.0  # of the Gumbel noise in that order; it falls to 0
    sample.revise = False  # hide the least sure units again in that order
    sample.keep_pixels = True  # inpainting's known pixels come back as they were
    sample.batch_size = 16

    config.evaluate = evaluate = ml_collections.ConfigDict()
    evaluate.num_images = 1_000  # of the test split, at most
    evaluate.num_samples = 1_000
    evaluate.bound_draws = 1  # of noise a step, for the likelihood bound of a test code
    evaluate.classifier_images = 10_000  # of the training split, at most, for its classifier
    evaluate.network = "inception"  # or "efficientnet", "classifier": whose features are compared
    evaluate.weights = ""  # its, "" for NETWORK.npz; `python -m binlatent.convert` writes it
    evaluate.reference = "train"  # or "test", a folder, an .npz file of images or statistics
    evaluate.labels = "balanced"  # of samples: classes in turn; or "data", as of training images
    evaluate.every = 0  # steps of the prior between metrics of num_samples samples; 0: none
    evaluate.metrics = ("fid",)  # these
    evaluate.cas_epochs = 90  # of the classifier that learns from samples
    evaluate.cas_batch_size = 256

    config.log_every = 100
    config.preview_every = 10_000  # loss on test images, and a picture in workdir/figures
    config.checkpoint_every = 5_000
    config.keep_checkpoints = 3
    config.on_nonfinite = "stop"  # or "skip": a step whose loss or gradient is no finite number
    config.debug_nans = False  # jax_debug_nans: slow, but names the operation that made a NaN
    if variant == "released":
        autoencoder.norm_first = True
        autoencoder.loss.mse, autoencoder.loss.l1 = 0.0, 1.0
        autoencoder.loss.adaptive = True
        autoencoder.loss.start_step = 400_001
        # Eight GPUs with 4 images each, at 4.5e-6 an image of one GPU.
        autoencoder.train.batch_size = 32
        autoencoder.train.learning_rate = 1.8e-5
        autoencoder.train.warmup_steps = 0
        autoencoder.train.max_grad_norm = 1e6  # none
        autoencoder.train.ema_decay = 0.9995  # 0.995 every ten steps
    elif variant != "paper":
        raise ValueError(f"a config is of the paper or :released, not :{variant}")
    return config.lock()
