"""Words: how an action of text is read."""


def normal(action: str) -> str:
  """An action in small letters, spaces between its words alone."""
  return ' '.join(action.lower().split())


def episodes(split: str, records: list[dict]) -> list[dict]:
  """Records with a column `episode`: those of another split are others, also
  where a game has few starts and each split all of them."""
  return [
    record | {'episode': f'{split} {i}'} for i, record in enumerate(records)
  ]
