"""What a compiled program tells about itself."""

import math
import re

_BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's16': 2, 'u16': 2, 's32': 4, 'u32': 4, 'f32': 4}
_BYTES |= {'s64': 8, 'u64': 8, 'f64': 8}
_COLLECTIVE = re.compile(
    r'= (?P<shape>\([^=]*?\)|\S+) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)'
    r'(?:-start)?\('
)


def count_collectives(hlo_text):
    """Counts the operations by which devices exchange data in a compiled program.

    Args:
      hlo_text: optimised HLO, of `compiled.as_text()`.

    Returns:
      {kind: {'count': int, 'bytes': int}}, bytes of the results on one device.
    """
    collectives = {}
    for match in _COLLECTIVE.finditer(hlo_text):
        sizes = [
            _BYTES[name] * math.prod(map(int, filter(None, shape.split(','))))
            for name, shape in re.findall(r'\b([a-z]+\d*)\[([\d,]*)\]', match['shape'])
        ]
        entry = collectives.setdefault(match['kind'], {'count': 0, 'bytes': 0})
        entry['count'] += 1
        entry['bytes'] += sum(sizes)
    return collectives
