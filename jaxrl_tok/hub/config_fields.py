"""Reading of single settings of config.json, for every family."""

ACTIVATIONS = {  # theirs -> ours
  'relu': 'relu',
  'silu': 'silu',
  'swish': 'silu',
  'gelu': 'gelu',
  'gelu_new': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
}


def refuse_unless(j, **wanted) -> None:
  """Raises ValueError for a setting that is there with another value.

  j: transformers' configuration.
  """
  for name, value in wanted.items():
    found = getattr(j, name, value)
    if found != value:
      raise ValueError(f'{name} {found} is not supported; only {value}')


def activation(name: str) -> str:
  """Translates the name of an activation. Raises ValueError, with the names
  there are, for any other."""
  if name not in ACTIVATIONS:
    raise ValueError(
      f'activation {name!r} is not supported; supported: '
      f'{", ".join(ACTIVATIONS)}'
    )
  return ACTIVATIONS[name]
