"""Writes docs/config.md: every field of configs/densenet121.py, its value in each mode and its meaning.

python scripts/document_config.py --output docs/config.md
"""

import pathlib
import re
import runpy

from absl import app, flags

from brain_jax import files

CONFIG = pathlib.Path(__file__).parents[1] / 'configs/densenet121.py'
MODES = ('finetune', 'frozen', 'scratch', 'demo')
_OUTPUT = flags.DEFINE_string('output', 'docs/config.md', 'File to write.')

HEAD = """\
# The fields of a run

Made from [`configs/densenet121.py`](../configs/densenet121.py) by `python scripts/document_config.py`. Each is set on
the command line, e.g. `--config.learning_rate=1e-4`. In the last column stand the modes whose value is another.
"""


def read_fields():
    """Returns the sections of the configuration: (title, list of (field, comment)) each."""
    sections = [('The run', [])]
    source, _, _ = CONFIG.read_text().partition("    if mode == 'frozen'")
    for paragraph in source.split('\n\n'):
        if title := re.match(r'    # ([^.]*)\.', paragraph):
            sections.append((title[1], []))
        fields = re.findall(r'^    config\.([\w.]+) = .*?(?:  # (.*))?$', paragraph, re.MULTILINE)
        sections[-1][1].extend(field for field in fields if field[0] != 'augment')
    return sections


def value_of(config, field):
    """Returns the value of a field, as it is written on the command line."""
    for name in field.split('.'):
        config = config[name]
    return f'`{config}`' if config not in ('', None) else ''


def format_markdown():
    """Returns the content of docs/config.md."""
    get_config = runpy.run_path(str(CONFIG))['get_config']
    configs = {mode: get_config(mode) for mode in MODES}
    lines = [HEAD]
    for title, fields in read_fields():
        lines += [f'## {title}', '', '| field | default | meaning | other modes |', '|---|---|---|---|']
        for field, comment in fields:
            values = {mode: value_of(config, field) for mode, config in configs.items()}
            default = values['finetune']
            others = ', '.join(f'{mode}: {value or "empty"}' for mode, value in values.items() if value != default)
            lines.append(f'| `{field}` | {default} | {comment.replace("|", chr(92) + "|")} | {others} |')
        lines.append('')
    return '\n'.join(lines)


def main(unused_argv):
    files.write_whole(pathlib.Path(_OUTPUT.value), format_markdown())


if __name__ == '__main__':
    app.run(main)
