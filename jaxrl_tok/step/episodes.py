"""Episodes in an environment, token in, token out.

Each turn:

1. `recall`   the device reads what is new in the transcript of every live row,
   ids as they were sampled and observed, after what it has read before.
2. `draw`     it samples a turn of each.
3. `take`     the turn's tokens join the transcript.
4. `respond`  environments answer, side by side; a reward stands on the last
   token of its turn, and the observation's ids join the transcript.

Programs are few: `row_counts` of rows by `transcript_lengths` of tokens. Rows
whose episode has ended cost little further: once a smaller program holds the
live ones, it reads their transcripts anew, as a larger one does once they have
outgrown theirs. Row b draws turn k by the key fold_in(fold_in(key, k), b): an
episode does not depend on the other rows.

For the update an episode is one completion of its prompt, see Rollout. The G
rows of a prompt get one seed, that of the prompt's place in the data's order.

Of several processes each plays the episodes of its own rows; they agree on the
next program before each turn.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrl_tok import processes
from jaxrl_tok.data.turns import Talk
from jaxrl_tok.sharding import put_rows, row_shards
from jaxrl_tok.types import Prompts, Rollout

# what ends an episode: the environment, its time or its error, and our limits
REASONS = (
  *('terminated', 'truncated', 'deadline', 'error'),
  *('max_turns', 'turn_length', 'episode_length'),
)
SHORTEST, FEWEST = 32, 4  # tokens and rows of the smallest program
TRAINING, EVALUATION = 0, 1  # streams of seeds


class Limits(NamedTuple):
  """Limits of episodes."""

  max_turns: int
  max_length: int  # T, all tokens after the prompt: turns and observations
  # turns cut at their length: 'act', the environment gets the text, or 'end',
  # the episode is over
  cut_turns: str = 'act'
  length_buckets: int = 1  # lengths of transcripts that are compiled for
  seats: int = 1  # of the environment, all played by the policy


class World(NamedTuple):
  """Environments and how they are talked to."""

  stepper: Any  # environments.Stepper
  talk: Talk
  limits: Limits
  on_error: str = 'raise'  # see rewards.ON_ERROR


@dataclasses.dataclass
class Episode:
  """Episode of one row, as far as it was played."""

  example: dict
  prompt: list  # ids
  first: Any = ''  # observation of reset
  tokens: list = dataclasses.field(default_factory=list)  # after the prompt
  mask: list = dataclasses.field(default_factory=list)
  logp: list = dataclasses.field(default_factory=list)
  num_kept: list = dataclasses.field(default_factory=list)
  turn: list = dataclasses.field(default_factory=list)
  seat: list = dataclasses.field(default_factory=list)
  reward: list = dataclasses.field(default_factory=list)
  story: list = dataclasses.field(default_factory=list)  # for samples.jsonl
  turns: int = 0
  read: int = 0  # ids of prompt and tokens that the device has read
  seats: int = 1
  acting: int = 0  # seat that acts next
  # {seat: its last column}
  last: dict = dataclasses.field(default_factory=dict)
  ended: str = ''  # one of REASONS; '' while it goes on
  info: dict = dataclasses.field(default_factory=dict)  # the last one

  def add(self, tokens, mask: bool, logp=None, num_kept=None) -> None:
    """Adds tokens: a turn's, or an observation's."""
    n = len(tokens)
    self.tokens += tokens
    self.mask += [mask] * n
    self.logp += [0.0] * n if logp is None else logp
    self.num_kept += [0] * n if num_kept is None else num_kept
    self.turn += [self.turns] * n
    self.seat += [self.acting] * n
    self.reward += [0.0] * n

  @property
  def length(self) -> int:
    """Tokens of the transcript."""
    return len(self.prompt) + len(self.tokens)

  def unread(self, most: int) -> list[int]:
    """The next `most` ids, or fewer, that the device has not read; from here on
    it has."""
    begin, first = self.read, len(self.prompt)
    self.read = min(self.length, begin + most)
    ids = self.prompt[begin : self.read]
    return ids + self.tokens[max(0, begin - first) : max(0, self.read - first)]

  @property
  def numbers(self) -> dict[str, float]:
    """Metrics of an episode that is over."""
    found = {'turns': float(self.turns)}
    found |= {f'ended/{r}': float(self.ended == r) for r in REASONS}
    if 'success' in self.info:
      found['success'] = float(bool(self.info['success']))
    for seat in range(self.seats) if self.seats > 1 else ():
      paid = (r for r, s in zip(self.reward, self.seat) if s == seat)
      found[f'reward/seat_{seat}'] = float(sum(paid))
    return found


class Sizes(NamedTuple):
  """Sizes of a batch of episodes, and what was compiled for it."""

  num_prompts: int  # C, of all processes
  samples: int  # G, episodes of each prompt
  max_prompt: int  # longest prompt
  counted: bool  # whether the sampler records num_kept


class TurnPrograms(NamedTuple):
  """Functions of a turn of R rows, after transcripts of P tokens at most."""

  # Prompts [R, P + chunk] -> memory of the device after these transcripts
  read: Callable
  # (rows int32 [R], number of the turn, memory) -> Rollout without prompts
  draw: Callable
  # (memory, ids [R, chunk], count int32 [R]) -> memory after the first `count`
  # ids, too; the memory that it is given is gone. None: transcripts are read
  # anew each turn
  append: Callable | None = None
  chunk: int = 0  # ids that are appended at a time


class Played(NamedTuple):
  """Episodes of a batch."""

  rollout: Rollout
  episodes: list[Episode]  # of this process's rows
  seconds: float  # that the environments took


# --- programs ----------------------------------------------------------------


def row_counts(rows: int, shards: int) -> list[int]:
  """Numbers of rows that a turn is compiled for, ascending: all, and about a
  quarter of them where that is worth it."""
  few = -(-rows // (4 * shards)) * shards
  return [few, rows] if FEWEST <= few < rows else [rows]


def transcript_lengths(prompt: int, max_length: int, count: int) -> list[int]:
  """Lengths of transcripts that a turn is compiled for, ascending: the longest,
  and each half the one after it, `count` at most, none below SHORTEST."""
  found = [prompt + max_length - 1]
  while len(found) < count and found[-1] >= 2 * SHORTEST:
    found.append(-(-found[-1] // 2))
  return found[::-1]


# --- one turn ----------------------------------------------------------------


class Memory(NamedTuple):
  """Transcripts that the device has read."""

  value: Any  # of TurnPrograms
  rows: list[int]  # in their places of the program
  size: tuple[int, int]  # of this process's rows, and tokens


def table(
  episodes: Sequence[Episode], rows: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
  """Ids [rows, length] that are to be read next, and their count [rows]."""
  tokens, count = np.zeros((rows, length), np.int32), np.zeros(rows, np.int32)
  for i, episode in enumerate(episodes):
    ids = episode.unread(length)
    tokens[i, : len(ids)], count[i] = ids, len(ids)
  return tokens, count


def recall(
  programs: TurnPrograms,
  memory: Memory | None,
  episodes: list[Episode],
  size: tuple[int, int],
  unread: int,
) -> Memory:
  """Memory of the device after the transcripts of all live rows.

  Args:
    memory: after the last turn; None: there was none.
    size: (rows, of this process's part, tokens) of the smallest program that
      holds them.
    unread: tokens that are new, of the row with most of them, of all processes.
  """
  mesh, (R, P) = jax.sharding.get_mesh(), size
  calls = -(-unread // programs.chunk) if programs.append else 0
  same = memory is not None and memory.size == size
  if not (same and calls and calls * programs.chunk < P):
    live = living(episodes)
    for episode in live.values():
      episode.read = 0
    tokens, count = table(list(live.values()), R, P + programs.chunk)
    prompts = put_rows(mesh, Prompts(tokens, np.maximum(count, 1)))
    return Memory(programs.read(prompts), list(live), size)
  value = memory.value
  for _ in range(calls):
    own = [episodes[row] for row in memory.rows]
    given = put_rows(mesh, table(own, R, programs.chunk))
    value = programs.append(value, *given)
  return memory._replace(value=value)


def draw(
  programs: TurnPrograms,
  memory: Memory,
  episodes: list[Episode],
  places: np.ndarray,
  number: int,
) -> dict[int, tuple]:
  """Samples a turn of every live row: {row: (ids, log-probs, num_kept | None,
  whether it ended by itself)}.

  places: number of each row here in the whole batch.
  """
  rows = np.zeros(memory.size[0], np.int32)
  rows[: len(memory.rows)] = places[memory.rows]
  rows = put_rows(jax.sharding.get_mesh(), rows)
  drawn = programs.draw(rows, np.int32(number), memory.value)
  found = processes.local(drawn)
  turns = {}
  for i, row in enumerate(memory.rows):
    if episodes[row].ended:
      continue
    n = int(found.mask[i].sum())
    kept = found.num_kept
    turns[row] = (
      found.tokens[i, :n].tolist(),
      found.logp[i, :n].tolist(),
      None if kept is None else kept[i, :n].tolist(),
      bool(found.ended[i]),
    )
  return turns


def take(episode: Episode, turn: tuple, limits: Limits) -> None:
  """Adds a turn's tokens to its episode, as many as there is room for."""
  ids, logp, kept, ended = turn
  room = limits.max_length - len(episode.tokens)
  episode.add(
    ids[:room], True, logp[:room], None if kept is None else kept[:room]
  )
  episode.turns += 1
  episode.last[episode.acting] = len(episode.tokens) - 1
  if len(ids) > room:
    episode.ended = 'episode_length'
  elif not ended and limits.cut_turns == 'end':
    episode.ended = 'turn_length'


def observe(episode: Episode, ids: list[int], limits: Limits) -> None:
  """Adds an observation's ids, or ends an episode that has no room left."""
  if len(episode.tokens) + len(ids) >= limits.max_length:
    episode.ended = 'episode_length'
  else:
    episode.add(ids, False)


def sit(episode: Episode, info: dict, seats: int) -> None:
  """Notes an environment's info: the seat that acts next, where it tells."""
  episode.info, seat = info, info.get('seat', episode.acting)
  if seat not in range(seats):
    raise ValueError(
      f'the environment gives the turn to seat {seat!r}, and --seats {seats} '
      'are numbered from 0; pass as many seats as it has'
    )
  episode.acting = int(seat)


def pay(episode: Episode, answer, seats: int) -> None:
  """Puts rewards on the last token of a turn: of the one that was taken, and
  with rewards by seat of the last one that each seat took."""
  rewards = answer.info.get('rewards') if seats > 1 else None
  for seat, reward in (rewards or {episode.acting: answer.reward}).items():
    if seat in episode.last:
      episode.reward[episode.last[seat]] += reward


def begin(world: World, examples: list, prompts: Prompts, seeds, samples: int):
  """Begins the episodes of this process's rows: a list of them."""
  rows = [c for c in range(len(examples)) for _ in range(samples)]
  given = [examples[c] for c in rows]
  answers = world.stepper.reset([int(seeds[c]) for c in rows], given)
  episodes = []
  for c, example, answer in zip(rows, given, answers):
    ids = prompts.tokens[c, : prompts.length[c]].tolist()
    episode = Episode(example, ids, answer.observation, info=answer.info)
    episode.seats = world.limits.seats
    episode.story.append({'observation': answer.observation})
    episode.ended = answer.ended
    if not answer.ended:
      sit(episode, answer.info, world.limits.seats)
      lead = world.talk.lead(example, answer.observation)
      if len(lead) >= world.limits.max_length:
        raise ValueError(
          f'the first observation has {len(lead)} tokens, which '
          f'--max_episode_length {world.limits.max_length} cannot hold; pass '
          f'--max_episode_length {4 * len(lead)}'
        )
      observe(episode, lead, world.limits)
    episodes.append(episode)
  return episodes


def respond(world: World, live: dict[int, Episode], turns: dict) -> None:
  """Gives the turns that were sampled to the environments, and their answers to
  the episodes."""
  said = dict(
    zip(turns, world.talk.texts([turn[0] for turn in turns.values()]))
  )
  for row, turn in turns.items():
    take(live[row], turn, world.limits)
    entry = {'action': said[row], 'reward': 0.0}
    if world.limits.seats > 1:
      entry['seat'] = live[row].acting
    live[row].story.append(entry)
  acting = {row: said[row] for row in turns if not live[row].ended}
  for row, answer in world.stepper.step(acting).items():
    episode = live[row]
    pay(episode, answer, world.limits.seats)
    if not answer.ended:
      sit(episode, answer.info, world.limits.seats)
    episode.info = answer.info
    episode.story[-1] |= {
      'reward': answer.reward,
      'observation': answer.observation,
    }
    if world.limits.seats > 1 and 'rewards' in answer.info:
      episode.story[-1]['rewards'] = answer.info['rewards']
    if answer.ended:
      episode.ended = answer.ended
    elif episode.turns >= world.limits.max_turns:
      episode.ended = 'max_turns'
    else:
      ids = world.talk.between(
        *(episode.example, episode.first, answer.observation),
        episode.tokens[-1],
      )
      observe(episode, ids, world.limits)


# --- a batch of episodes -----------------------------------------------------


def living(episodes: list[Episode]) -> dict[int, Episode]:
  """Episodes that go on, by row."""
  return {row: e for row, e in enumerate(episodes) if not e.ended}


def needed(episodes: list[Episode]) -> list[int]:
  """Number of rows that go on, of tokens of their longest transcript, and of
  tokens that are new in one."""
  sizes = [(e.length, e.length - e.read) for e in episodes if not e.ended]
  return [len(sizes), *map(max, zip((0, 0), *sizes))]


def play(
  programs: TurnPrograms,
  world: World,
  sizes: Sizes,
  examples: list,
  prompts: Prompts,
  seeds: Sequence[int],
  version: int,
) -> Played:
  """Plays an episode for each row, to its end.

  Args:
    programs: of one policy and key.
    examples, prompts, seeds: of this process's prompts, on the host.
    version: updates before this step.

  Must run under jax.set_mesh.
  """
  mesh, limits, G = jax.sharding.get_mesh(), world.limits, sizes.samples
  own, B = processes.own_rows(mesh, sizes.num_prompts), sizes.num_prompts * G
  places = (own[:, None] * G + np.arange(G)).reshape(-1)
  counts = row_counts(B, row_shards(mesh))
  lengths = transcript_lengths(
    sizes.max_prompt, limits.max_length, limits.length_buckets
  )
  began = time.monotonic()
  episodes, told = processes.together(
    functools.partial(begin, world, examples, prompts, seeds, G), needed
  )
  spent, memory = time.monotonic() - began, None
  for number in range(limits.max_turns):
    most, longest, unread = (max(values) for values in zip(*told))
    if not most:
      break
    R = next(
      n * len(places) // B for n in counts if n * len(places) >= most * B
    )
    P = next(n for n in lengths if n >= longest)
    memory = recall(programs, memory, episodes, (R, P), unread)
    drawn = draw(programs, memory, episodes, places, number)
    began = time.monotonic()
    answer = functools.partial(respond, world, living(episodes), drawn)
    _, told = processes.together(answer, lambda _: needed(episodes))
    spent += time.monotonic() - began
  rollout = pack(episodes, prompts, limits, sizes.counted, version)
  return Played(rollout, episodes, spent)


def pack(
  episodes: list[Episode],
  prompts: Prompts,
  limits: Limits,
  counted: bool,
  version: int,
) -> Rollout:
  """Rollout of episodes, each one completion of its prompt, without gaps."""

  def table(name: str, dtype, fill=0):
    out = np.full((len(episodes), limits.max_length), fill, dtype)
    for row, episode in zip(out, episodes):
      values = getattr(episode, name)
      row[: len(values)] = values
    return out

  rollout = Rollout(
    prompts,
    tokens=table('tokens', np.int32),
    mask=table('mask', bool),
    logp=table('logp', np.float32),
    num_kept=table('num_kept', np.int32) if counted else None,
    ended=np.array([e.ended == 'terminated' for e in episodes]),
    version=np.full(len(episodes), version, np.int32),
    turn=table('turn', np.int32),
    seat=table('seat', np.int32) if limits.seats > 1 else None,
  )
  return put_rows(jax.sharding.get_mesh(), rollout)


def episode_seeds(seed: int, stream: int, numbers) -> list[int]:
  """Seeds of episodes by their prompts' numbers: positions in the data's order
  while training, indices of records in an evaluation."""
  return [
    int(np.random.default_rng((seed, stream, int(n))).integers(2**31))
    for n in numbers
  ]
