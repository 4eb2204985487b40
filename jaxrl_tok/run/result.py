"""Result of a run: its numbers, its samples, and the policy, ready to use."""

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import jax
import rich.table
import rich.text

from jaxrl_tok import data, processes, sharding
from jaxrl_tok.data.chat import content_text
from jaxrl_tok.report import mirror
from jaxrl_tok.report.files import read_metrics, read_rows
from jaxrl_tok.report.page import Report
from jaxrl_tok.run.evaluations import evaluate_params, make_draw
from jaxrl_tok.run.inputs import chat_of, renames
from jaxrl_tok.run.prepare import Setup, make_evaluations
from jaxrl_tok.run.task import Task
from jaxrl_tok.run.turns import max_length
from jaxrl_tok.run.world import make_world
from jaxrl_tok.sampler import SamplerConfig, make_sampler
from jaxrl_tok.step.reference import make_reference_logp


class Result:
  """Result of a finished run.

  Attributes:
    run_dir: directory of the run; of one in a bucket, its local copy, which
      is there as long as this process.
    summary: {label: text}, as the console shows it.
    report: page report.html; shows itself in a notebook.
    state: TrainState after the last step; with --export best of the best one.
    rows: held-out completions of that policy.
  """

  def __init__(
    self,
    run_dir: Path,
    summary: dict,
    report: Report,
    setup: Setup,
    state: Any,
    rows: list[dict],
  ):
    self.run_dir, self.summary, self.report = run_dir, summary, report
    self.state, self.rows = state, rows
    self._setup = setup

  def __repr__(self) -> str:
    lines = (f'{name}: {text}' for name, text in self.summary.items())
    return '\n'.join([f'run {mirror.name_of(self.run_dir)}', *lines])

  @property
  def metrics(self) -> list[dict]:
    """Rows of metrics.jsonl: one for each step and each evaluation."""
    return read_metrics(self.run_dir)

  @property
  def samples(self) -> list[dict]:
    """Rows of samples.jsonl: recorded completions."""
    return read_rows(self.run_dir / 'samples.jsonl')

  @functools.cached_property
  def params(self):
    """The policy's parameters, adapters merged in."""
    return self._setup.policy.merge_params(*self.state.policy_params)

  @functools.cache  # noqa: B019  a program for each kind of sampling
  def _sampler(self, config: SamplerConfig):
    return jax.jit(make_sampler(self._setup.policy, config))

  @functools.cached_property
  def _reference_logp(self):
    measure = jax.jit(make_reference_logp(self._setup.policy, None))
    params, rule = self.state.reference_params, self._setup.rule
    return lambda rollout: measure(params, rollout, rule)

  def generate(
    self, prompts: Sequence, greedy: bool = True, seed: int = 0
  ) -> list[str]:
    """Completes each prompt, which is text or a list of messages.

    greedy: takes the most likely tokens; False: samples as in training.
    """
    s = self._setup
    records = data.open_records([{'prompt': p} for p in prompts])
    found = data.prompt_set(
      records,
      s.model.tokenizer,
      s.model.vocab_size,
      name='prompt',
      chat=chat_of(s.settings),
      whole=s.model.is_encoder_decoder,
    )
    shards = sharding.row_shards(s.mesh)
    more = -len(records) % shards
    asked = [*records, *([records[0]] * more)]
    own = processes.own_rows(s.mesh, len(asked))
    batch, _ = found.batch([asked[i] for i in own], found.buckets[-1])
    config = s.config.greedy if greedy else s.config.sampler
    with jax.set_mesh(s.mesh):
      rollout = self._sampler(
        dataclasses.replace(config, samples_per_prompt=1)
      )(
        self.params,
        jax.random.key(seed),
        sharding.put_rows(s.mesh, batch),
        s.rule,
      )
      tokens, mask = processes.whole((rollout.tokens, rollout.mask))
    ids = [row[m].tolist() for row, m in zip(tokens, mask)]
    return s.decode(ids[: len(records)])

  def evaluate(self, task: Task) -> dict:
    """Metrics of the policy on the held-out data of a task."""
    s, found = self._setup, {}
    held_out = task.held_out
    if isinstance(held_out, Integral):
      opened = data.open_records(
        task.train, s.settings.run.seed, renames(s.settings)
      )
      held_out = data.split(opened, held_out).held_out
    evaluations = make_evaluations(
      task, s.settings, s.model, held_out, s.config, s.mesh
    )
    T = max_length(s.settings, s.config.sampler.max_completion_length)
    world = make_world(
      task, s.settings, s.model, T, evaluations[0].data.records
    )
    setup = s._replace(world=world)
    with jax.set_mesh(s.mesh), contextlib.ExitStack() as opened:
      if world is not None:
        opened.enter_context(world.stepper)
      for e in evaluations:
        draw = self._sampler(e.sampler)
        if world is not None:
          draw = make_draw(setup, e.sampler)
        found |= evaluate_params(
          setup, e, self.params, draw, self._reference_logp
        ).metrics
    return found

  def export(self, out: str | Path) -> Path:
    """Writes the policy as a directory that --model opens."""
    s, state = self._setup, self.state
    card = {'title': Path(out).name, 'metrics': self.summary}
    return s.trainable.save(out, state.params, state.frozen, card, s.dtype)


def one_line(value) -> str:
  """Shortens a prompt or completion to one line of a table."""
  if isinstance(value, list):
    value = content_text(value[-1].get('content'))
  return ' '.join(str(value).split()) if value is not None else ''


def show_samples(console, rows: list[dict], count: int = 8) -> None:
  """Prints a table of completions; the answer's column only where there are
  answers."""
  rows = rows[:count]
  names = ['prompt', 'answer', 'completion', 'reward']
  if all(row['answer'] is None for row in rows):
    names.remove('answer')
  table = rich.table.Table(*names)
  for row in rows:
    reward = row['reward']
    cells = row | {'reward': '-' if reward is None else f'{reward:g}'}
    texts = (one_line(cells[name]) for name in names)
    table.add_row(*(rich.text.Text(text[:300]) for text in texts))
  console.print(table)
