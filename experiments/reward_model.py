r"""Reward model: learns from pairs which of two completions people prefer.

  python -m experiments.reward_model
  python -m experiments.reward_model --model Qwen/Qwen2.5-0.5B-Instruct \
    --lora_rank 16 --data pairs.jsonl

pairs.jsonl has a pair a line, {"prompt", "chosen", "rejected"} in text or
messages, as TRL has them; what both completions begin with is the prompt where
there is none, and a column "margin" says how much better the chosen one is. The
model is a classifier of one label, fitted to -log sigmoid(s_chosen - s_rejected
- margin) by the loop of supervised starts, from random weights or from the
trunk of --model. Its directory, export/, is a ...ForSequenceClassification that
transformers opens and --reward_model loads: one score on the last token, or by
--reward_model_by token its change with every token.

Without --data, the pairs are opinions (experiments/opinions.py): a judge who
knows the true reward prefers by chance, so that the truth itself is right on
88 % of the held-out pairs, with a log-loss of 0.32. reward_model.json and the
console show accuracy with its interval, log-loss, mean margin and calibration,
and the truth's beside them.

With seeds 0, 1 and 2, accuracy was 0.76, 0.75 and 0.75 and log-loss 0.51, 0.53
and 0.50, in 3 minutes on 2 CPU cores, beside other work. On opinions of one to
four words, 400 steps in place of 200 were worse for two seeds of three: the
4,000 pairs are learnt by heart.
The scores mean nothing for texts that are unlike those of the pairs, such as
other words, which a policy soon finds.
"""

import sys

from jaxrl_tok.run import flags as flag_layer
from jaxrl_tok.run.settings import (
  DataSettings,
  ModelSettings,
  RunSettings,
  SamplingSettings,
  Settings,
  flatten,
  with_values,
)
from jaxrl_tok.run.task import Caller

PROG = 'python -m experiments.reward_model'
DEFAULTS = with_values(
  Settings(),
  {'max_steps': 200, 'eval_every': 50, 'num_prompts': 64},
)
USED = {
  RunSettings: 'output_dir seed max_steps eval_every report_to',
  DataSettings: 'max_prompt_length long_prompts chat_template_kwargs chat_date',
  ModelSettings: 'model revision param_dtype lora_rank lora_alpha lora_targets '
  'lora_adapter dtype remat attention scan_layers cpu_devices mesh',
  SamplingSettings: 'num_prompts max_completion_length',
}
# flags, and groups of them, that would change nothing
UNUSED = (
  *(
    name
    for group, used in USED.items()
    for name in flatten(group()).keys() - set(used.split())
  ),
  # the group's own name would leave out --learning_rate, too
  *(flatten(Settings().optimizer).keys() - {'learning_rate', 'optimizer'}),
  *('algorithm', 'warm_start'),
)


def pairs(
  data: str | None = None,
  held_out_data: str | None = None,
  held_out_pairs: int = 500,
  num_pairs: int = 4_000,
  center: float = 0.01,
  prefixes: float = 0.1,
) -> dict:
  """Pairs of completions, and the loss that they are learned by.

  Args:
    data: Pairs {"prompt", "chosen", "rejected"}, "margin" where there is one: a
      jsonl or parquet file, or hub:OWNER/NAME@REVISION:SPLIT. Default: opinions
      that are drawn at random, whose true reward is known.
    held_out_data: Held-out pairs; default: the end of --data.
    held_out_pairs: Pairs to hold out of --data, each of another prompt.
    num_pairs: Pairs that are drawn where there is no --data.
    center: Weight of the squared sum of a pair's scores, which keeps their
      mean at 0.
    prefixes: Weight of the term that makes the score of a prefix the expected
      score of its continuations, for --reward_model_by token.
  """
  from experiments.opinions import draw_pairs
  from jaxrl_tok.data import check_counts
  from jaxrl_tok.data.pairs import read_pairs

  if data is None:
    check_counts(num_pairs=num_pairs, held_out_pairs=held_out_pairs)
    found, held_out = draw_pairs(num_pairs, 0), draw_pairs(held_out_pairs, 1)
  else:
    found, held_out = data, held_out_data or held_out_pairs
  found, same = read_pairs(found)
  if not isinstance(held_out, int):
    held_out, more = read_pairs(held_out)
    same += more
  if same:
    print(f'{same:,} pairs of two equal completions are left out')
  return {
    'pairs': found,
    'held_out': held_out,
    'center': center,
    'prefixes': prefixes,
  }


def run(argv=None):
  """Fits a reward model; a fault is one line and exit status 2."""
  argv = sys.argv[1:] if argv is None else list(argv)
  parsed = flag_layer.parse(DEFAULTS, pairs, PROG, argv, __doc__, UNUSED)
  try:
    if 'optimizer' in parsed.typed:
      raise ValueError(
        '--optimizer has no effect here: a reward model is fitted by Adam; '
        'leave it out'
      )
    given = pairs(**parsed.own)
    from jaxrl_tok.run import reward_model

    setup = reward_model.prepare(
      given['pairs'],
      given['held_out'],
      parsed.settings,
      Caller('reward_model', ' '.join([PROG, *argv])),
      reward_model.PairSettings(given['center'], given['prefixes']),
    )
    return reward_model.run(setup)
  except (ValueError, OSError) as e:
    flag_layer.fail(e)


if __name__ == '__main__':
  run()
