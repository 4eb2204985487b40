"""Stepper: the episodes of a batch, side by side, each turn with a deadline.

1. `reset` begins an episode for each row.
2. `step` gives actions to the rows that are live, and waits for all of them.
3. A row whose episode has ended takes no further action.

Nothing depends on which thread is first: turns come in the order of the rows,
and of several errors that of the first row is raised.
"""

from typing import Any, NamedTuple

from jaxrl_tok.environments.check import check_reset, check_step
from jaxrl_tok.environments.episodes import Episode, Outcome, RemoteEpisode
from jaxrl_tok.environments.protocol import Maker, Messages
from jaxrl_tok.environments.threads import Job, Threads
from jaxrl_tok.rewards.functions import own_lists, quote

ON_ERROR = 'raise', 'end'
START = 120  # seconds in which a process starts


class Turn(NamedTuple):
  """Answer of an environment."""

  observation: str | Messages
  reward: float
  # '' while it goes on; 'terminated', 'truncated', 'deadline' or 'error'
  ended: str
  info: dict  # with its text as 'error' after a deadline or an error
  seconds: float


class EpisodeError(ValueError):
  """An environment raised an exception, or returned something else than its
  protocol has. The message is one line; `traceback` is its author's part."""

  def __init__(self, text: str, traceback: str = ''):
    super().__init__(text)
    self.traceback = traceback or text


class Row(NamedTuple):
  """Episode of a row."""

  episode: Episode | RemoteEpisode
  number: int
  seed: int
  turns: list  # of each step done so far, its action

  @property
  def place(self) -> str:
    """Place of an error in words."""
    turn = f'turn {len(self.turns)}' if self.turns else 'its reset'
    return f'{turn} (row {self.number}, seed {self.seed})'


class Stepper:
  """Episodes of all rows.

  Args:
    make: makes an environment, for one episode; with processes a function that
      another process can import.
    deadline: seconds of a turn. A late turn ends its episode: 'deadline',
      reward 0.
    workers: turns that run side by side.
    processes: runs each row in a process of its own, which is ended where it is
      late. A late thread cannot be ended: it is left alone.
    on_error: 'raise', or 'end': the episode of an environment that raises, or
      returns something else than its protocol has, ends as 'error', reward 0.
  """

  def __init__(
    self,
    make: Maker,
    deadline: float = 30.0,
    workers: int = 8,
    processes: bool = False,
    on_error: str = 'raise',
  ):
    if not callable(make):
      raise ValueError(
        f'the environment is a {type(make).__name__}, of which one episode '
        'could be played; pass a function that makes one, its class or '
        'environments.maze()'
      )
    if not deadline > 0 or workers < 1:
      raise ValueError(
        f'a deadline of {deadline} s and {workers} workers; both are above 0'
      )
    if on_error not in ON_ERROR:
      raise ValueError(f'on_error {on_error!r} is one of {", ".join(ON_ERROR)}')
    self.make, self.on_error = make, on_error
    self.deadline = deadline
    self.threads = Threads(workers, deadline)
    self.kind: Any = RemoteEpisode if processes else Episode
    self.rows: dict[int, Row] = {}  # that are live
    self.idle: list = []  # processes without an episode

  def reset(self, seeds: list[int], examples: list[dict]) -> list[Turn]:
    """Begins an episode for each row, in place of all that were there."""
    if len(seeds) != len(examples):
      raise ValueError(
        f'{len(seeds)} seeds for {len(examples)} examples; give one for each'
      )
    self.finish(list(self.rows))
    episodes = [self.new_episode() for _ in seeds]
    if self.kind is RemoteEpisode:
      self.start_processes(episodes)
    self.rows = {
      i: Row(episode, i, int(seed), [])
      for i, (episode, seed) in enumerate(zip(episodes, seeds))
    }
    examples = own_lists({'examples': list(examples)})['examples']
    jobs = self.threads.run(
      [
        lambda row=row, example=example: row.episode.reset(row.seed, example)
        for row, example in zip(self.rows.values(), examples)
      ]
    )
    return list(self.settle(dict(zip(list(self.rows), jobs))).values())

  def step(self, actions: dict[int, str]) -> dict[int, Turn]:
    """Answers to the actions of live rows."""
    for row in actions:
      if row not in self.rows:
        raise ValueError(
          f'row {row} has no episode, or it has ended; give actions of live '
          'rows'
        )
    for row, action in actions.items():
      self.rows[row].turns.append(action)
    jobs = self.threads.run(
      [
        lambda row=self.rows[row], action=action: row.episode.step(action)
        for row, action in actions.items()
      ]
    )
    return self.settle(dict(zip(actions, jobs)))

  def close(self) -> None:
    """Closes all episodes, and ends idle threads and all processes."""
    self.finish(list(self.rows))
    for episode in self.idle:
      episode.kill()
    self.idle = []
    self.threads.close()

  def __enter__(self):
    return self

  def __exit__(self, *error) -> None:
    self.close()

  def new_episode(self):
    return self.idle.pop() if self.idle else self.kind(self.make)

  def start_processes(self, episodes: list) -> None:
    """Starts processes that do not run; none counts as a turn's time."""
    jobs = self.threads.run([e.prepare for e in episodes], START)
    error = next((job.error for job in jobs if job.error), None)
    if error is not None:
      raise error
    if any(job.late for job in jobs):
      raise ValueError(
        f'a process of the environment {episodes[0].name} did not start within '
        f'{START} s; import less beside it, or use threads'
      )

  def settle(self, jobs: dict[int, Job]) -> dict[int, Turn]:
    """Turns of jobs that are done or late; ends episodes."""
    turns, errors = {}, []
    for row, job in jobs.items():
      turns[row], error = self.as_turn(self.rows[row], job)
      errors += [error] if error else []
    late = [row for row, turn in turns.items() if turn.ended == 'deadline']
    for row in late:
      self.rows.pop(row).episode.kill()
    self.finish([row for row in turns if turns[row].ended and row not in late])
    if errors and self.on_error == 'raise':
      raise errors[0]
    return turns

  def finish(self, rows: list[int]) -> None:
    """Closes the episodes of rows."""
    episodes = [self.rows.pop(row).episode for row in rows]
    for episode, job in zip(
      episodes, self.threads.run([e.close for e in episodes])
    ):
      if job.late:
        episode.kill()
    if self.kind is RemoteEpisode:
      self.idle += episodes

  def as_turn(self, row: Row, job: Job) -> tuple[Turn, EpisodeError | None]:
    """(turn, its error | None)."""
    if job.error is not None:
      raise job.error  # a fault of ours: episodes raise nothing
    if job.late:
      said = (
        f'environment {row.episode.name} took longer than {self.deadline:g} s '
        f'at {row.place}'
      )
      return Turn('', 0.0, 'deadline', {'error': said}, job.seconds), None
    try:
      observation, reward, ended, info = read(row, job.value)
    except EpisodeError as e:
      turn = Turn('', 0.0, 'error', {'error': str(e)}, job.seconds)
      return turn, e
    return Turn(observation, reward, ended, info, job.seconds), None


def read(row: Row, outcome: Outcome) -> tuple:
  """(observation, reward, ended, info) of a call. Raises EpisodeError."""
  where = f'environment {outcome.name} at {row.place}'
  if outcome.failure is not None:
    action = f' on the action {quote(row.turns[-1])}' if row.turns else ''
    cure = "mend it, or end such episodes with on_error='end'"
    raise EpisodeError(
      f'{where}{action}: {outcome.failure.described}; {cure}',
      outcome.failure.traceback,
    )
  try:
    if not row.turns:
      observation, info = check_reset(outcome.value, where)
      return observation, 0.0, '', info
    observation, reward, terminated, truncated, info = check_step(
      outcome.value, where
    )
  except ValueError as e:
    raise EpisodeError(str(e)) from None
  ended = 'terminated' if terminated else 'truncated' if truncated else ''
  return observation, reward, ended, info
