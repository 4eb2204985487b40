r"""RL on tokens of any model, with your own data and rewards.

  python -m experiments.text --model Qwen/Qwen2.5-0.5B-Instruct \
    --data prompts.jsonl --reward my_rewards.py:rhyme \
    --reward my_rewards.py:short=0.2 --held_out 100

prompts.jsonl has a prompt a line, text or messages, and the columns that the
rewards read; my_rewards.py is the only Python to write:

  def rhyme(prompts, completions, rhymes_with, **columns):
    return [float(c.endswith(w)) for c, w in zip(completions, rhymes_with)]

  def short(prompts, completions, **columns):
    return [1 / (1 + len(c)) for c in completions]

Where a prompt is messages its completion is too: c[0]['content'] is the text.

Limits and canaries, beside the reward:

  --limit my_rewards.py:harm --constraint 'harm<=0.01' --canaries canaries.jsonl

The file is run on this machine, as any program is. --data takes a jsonl or
parquet file, or hub:OWNER/NAME@REVISION:SPLIT; its last records are held out.
--rename question=prompt gives a column the name that it needs.
"""

from jaxrl_tok import Evaluation, Task, main


def text(
  data: str,
  reward: tuple[str, ...] = (),
  held_out_data: str | None = None,
  answers: str | None = None,
  limit: tuple[str, ...] = (),
  canaries: str | None = None,
  held_out: int | None = None,
  reward_model: str | None = None,
) -> Task:
  """Task of your own data and rewards.

  Args:
    data: Training data: a jsonl or parquet file, or
      hub:OWNER/NAME@REVISION:SPLIT.
    reward: Reward function, FILE:FUNCTION or FILE:FUNCTION=WEIGHT; give the
      flag once for each. The file is run.
    held_out_data: Held-out data, as --data; default: the end of --data.
    answers: Column of right answers, which a new policy (no --model) learns
      first.
    limit: Function that --constraint limits, FILE:FUNCTION, written as a reward
      and never part of it; give the flag once for each. The file is run.
    canaries: Prompts (jsonl) that every evaluation completes, outside of all
      rewards; all completions are kept and shown in the report.
  """
  from jaxrl_tok import rewards

  if not (reward or reward_model):
    raise ValueError(
      'there is no reward; pass --reward FILE:FUNCTION, as '
      '--reward my_rewards.py:rhyme, or a --reward_model'
    )
  found = rewards.load_rewards(reward)
  limited = {name: f for name, (f, _) in rewards.load_rewards(limit).items()}
  words = (*reward, *limit)
  for file in dict.fromkeys(word.rpartition(':')[0] for word in words):
    print(f'{file} was run for its rewards')
  evaluations = ()
  if canaries:
    evaluations = (
      Evaluation('canaries', canaries, rewards=(), keep_samples=True),
    )
  return Task(
    data,
    found,
    held_out=held_out_data or held_out or 512,
    answers=answers,
    constraints=limited,
    evaluations=evaluations,
  )


def run(argv=None):
  return main(text, argv)


if __name__ == '__main__':
  run()
