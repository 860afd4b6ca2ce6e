"""Converts DenseNet weights of Keras, torchvision or timm to brain_jax's safetensors layout.

python scripts/convert_weights.py --source imagenet --output densenet121.safetensors
python scripts/convert_weights.py --source my_model.keras --output my_model.safetensors
"""

import sys

from absl import app, flags

from brain_jax import InputError, pretrained

_SOURCE = flags.DEFINE_string(
    'source', None, "A .h5, .keras or .safetensors file, or 'imagenet', the published Keras weights.", required=True
)
_OUTPUT = flags.DEFINE_string('output', None, 'The .safetensors file to write.', required=True)
_MODEL = flags.DEFINE_enum('model', None, pretrained.MODELS, 'What the file must hold; default: whatever it holds.')


def main(argv):
    del argv
    try:
        weights = pretrained.read_weights(_SOURCE.value, _MODEL.value)
        num_arrays, num_values = pretrained.write_weights(
            _OUTPUT.value, weights.variables, source=weights.source, source_sha256=weights.sha256
        )
    except InputError as error:
        sys.exit(f'error: {error}')
    print(f'wrote {_OUTPUT.value}: {num_values} values in {num_arrays} arrays')
    print(f'from {weights.source} (layout {weights.layout}, SHA-256 {weights.sha256})')


if __name__ == '__main__':
    app.run(main)
