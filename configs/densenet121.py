"""Fine-tune DenseNet121 on brain-MRI images.

    python -m brain_jax.main --config configs/densenet121.py[:MODE] --workdir runs/first

MODE is one of

    finetune  every layer learns, the new head first (the default)
    frozen    the backbone stays as it is; its features are computed once and the head learns on them
    scratch   the recipe of finetune from random weights
    demo      scratch on a small generated dataset, for a machine without data or weights

Any field is set from the command line, e.g. `--config.learning_rate=1e-4`.
"""

import ml_collections
from ml_collections import config_dict


def get_config(mode='finetune'):
    """Returns the configuration of one training run.

    Args:
      mode: 'finetune', 'frozen', 'scratch' or 'demo'.

    Returns:
      A `ConfigDict`.

    Raises:
      ValueError: for another mode.
    """
    config = ml_collections.ConfigDict()
    config.mode = mode
    config.seed = 0

    # The data.
    config.data_dir = config_dict.placeholder(str)  # folder with Training/ and Testing/; None: look, then ask Kaggle
    config.dataset = 'auto'  # 'kaggle_v1' | 'kaggle_v2' | 'folder' | 'auto': folder with a data_dir, else kaggle_v1
    config.prepared_dir = config_dict.placeholder(str)  # where prepared records are kept; None: the tfds folder
    config.groups = config_dict.placeholder(str)  # CSV (path, group, patient_id): what belongs together; None: copies
    config.skip_mislabelled = False  # leave out the images whose source_label in the group table is not their class
    config.skip_unreadable = False  # leave unreadable files out (and count them) instead of stopping
    config.split = 'standard'  # 'standard': the folders | 'grouped': folds of whole groups | 'random': of images
    config.folds = 5  # parts of all images, when not 'standard'; drawn by the seed
    config.fold = 0  # which part is the test split, from 0
    config.validation_fraction = 0.1  # part of the training images, whole groups; 0: no selection, fixed length
    config.image_size = 224  # pixels, after padding to a square
    config.cache_images = 'auto'  # hold resized images in memory: 'always' | 'never' | 'auto': when they fit

    # The network.
    config.model = 'DenseNet121'  # 'DenseNet121' | 'DenseNet169' | 'DenseNet201'
    config.head = 'last'  # sees the means of 'last': the last map | 'wide': three stages' maps, and of their middles
    config.dtype = 'float32'  # 'float32' | 'bfloat16' computation; parameters and statistics stay float32
    config.remat = 'none'  # computed again instead of kept, to save memory: 'none' | 'dense_layers' | 'full'
    config.batch_norm = 'train'  # 'train': batch statistics | 'frozen': the running ones, never updated
    config.batch_norm_momentum = 0.97  # share of the old running statistics that a step keeps
    config.pretrained = 'imagenet'  # 'imagenet' | a .h5, .keras or .safetensors file | '' for random weights

    # The optimiser. Steps follow from epochs, the number of images and the batch size.
    config.batch_size = 32  # images a step, over all devices
    config.gradient_accumulation = 1  # parts a batch is cut into, one after the other, to save memory
    config.num_epochs = 4.0
    config.optimizer = 'adamw'  # 'sgd' (momentum) | 'adam' | 'adamw' | 'lamb'
    config.learning_rate = 3e-4  # peak, of the last backbone layer
    config.head_multiplier = 10.0  # the head learns this many times faster
    config.head_epochs = 0.1  # at the start only the head learns, for so many epochs
    config.layer_decay = 1.0  # the rate shrinks by this factor a dense layer, from the last to the first
    config.schedule = 'cosine'  # 'cosine' | 'linear' | 'exponential' | 'piecewise' | 'constant', after a warm-up
    # The backbone's schedule starts after the head's epochs: its fractions are those of the steps that are left.
    config.warmup_fraction = 0.1  # of all steps, linear from 0
    config.final_fraction = 0.0  # rate at the last step over the peak rate (cosine, linear; exponential needs > 0)
    config.boundaries = (0.5, 0.75)  # piecewise: fractions of all steps ...
    config.boundary_scale = 0.1  # ... at which the rate is multiplied by this
    config.momentum = 0.9  # sgd
    config.weight_decay = 1e-4  # on kernels only
    config.gradient_clip = 1.0  # largest global norm; 0: off
    config.freeze = ''  # regular expression: parameters whose path ('conv1_conv/kernel') it finds do not learn
    config.label_smoothing = 0.05
    config.class_weights = 'none'  # 'none' | 'balanced': a class weighs as if all were equally frequent
    config.mixup = 0.0  # alpha of the Beta distribution; 0: off
    config.ema_decay = 0.0  # exponential moving average of the parameters, used to evaluate; 0: off
    config.early_stopping = 0  # stop after so many evaluations without a better validation loss; 0: off

    # Augmentation, drawn anew for every image and step.
    config.augment = ml_collections.ConfigDict()
    config.augment.flip_horizontal = True
    config.augment.flip_vertical = False
    config.augment.rotation = 15.0  # degrees to either side
    config.augment.zoom = 0.1  # fraction in or out
    config.augment.shift = 0.05  # fraction of the side
    config.augment.brightness = 0.15  # factor 1 +- this
    config.augment.contrast = 0.0  # factor 1 +- this, around the mean

    # Cadences and output.
    config.log_every_steps = 10
    config.eval_every_epochs = 1.0
    config.checkpoint_every_steps = 100
    config.eval_batch_size = 64
    config.average_flips = True  # evaluate an image and its mirror image (given augment.flip_horizontal), and average
    config.compilation_cache = 'auto'  # folder of compiled programs; 'auto': beside the workdir; '': none
    config.distributed = 'off'  # 'off' | 'auto' | 'HOST:PORT,COUNT,INDEX': several processes, docs/distributed.md
    config.profile = False  # write a profile of a few steps for TensorBoard

    if mode == 'frozen':
        config.num_epochs = 25.0
        config.batch_size = 256
        config.freeze = '^(?!predictions)'
        config.head = 'wide'
        config.weight_decay = 10.0
        config.mixup = 0.5
        config.head_epochs = 0.0
        config.label_smoothing = 0.0
        config.log_every_steps = 100
        config.eval_every_epochs = 5.0
        config.checkpoint_every_steps = 1000
    elif mode == 'scratch':
        config.pretrained = ''
        config.batch_norm_momentum = 0.9  # random weights change fast, and running statistics must keep up
        config.head_epochs = 0.0
        config.head_multiplier = 1.0
    elif mode == 'demo':
        config.pretrained = ''
        config.batch_norm_momentum = 0.9  # random weights change fast, and running statistics must keep up
        config.head_epochs = 0.0
        config.head_multiplier = 1.0
        config.image_size = 64
        config.learning_rate = 1e-3
        config.num_epochs = 6.0
        config.eval_every_epochs = 2.0
    elif mode != 'finetune':
        raise ValueError(f"unknown mode {mode!r}: use 'finetune', 'frozen', 'scratch' or 'demo'")
    return config
