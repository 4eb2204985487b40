r"""PPO on tokens learns to continue movie reviews positively: IMDB of GRUE.

  pip install -e '.[data]' && pip install torch      # torch: for the classifier
  python -m experiments.imdb

  python -m experiments.imdb --data reviews.jsonl --model DIR \
    --sentiment vader                                # without a network

A prompt is the end, 64 tokens, of the first half of a review; the policy writes
48 tokens more. The reward is the probability that lvwerra/distilbert-imdb, on
the host, gives to a positive review of prompt and completion; --sentiment vader
takes VADER's score of the completion instead, -1 to 1, without torch.

The defaults are the recipe of RL4LMs (arXiv:2210.01241; gpt2_ppo.yml of its
imdb_text_continuation): PPO with 5 epochs, a KL to the start of 0.1 in the
reward, a learning rate of 1e-6, 64 + 48 tokens, and a budget of 64,000 sampled
tokens, 50 updates of 1,280. Differences: 27 reviews an update (1,296 tokens);
mini-batches of 48 tokens, not 64; a constant KL coefficient; a completion may
end early; line breaks <br /> are read as such. Theirs starts from
lvwerra/gpt2-imdb, a GPT-2 that has read reviews; --model takes it where its
weights are safetensors.

No run of ours was made with these data: the machine that this was written on
has no network. The results of the recipe are its authors', in the paper's table
of IMDB. The tests run it on made-up reviews and a tiny GPT-2.

The metrics that no reward sees: perplexity under the starting policy, distinct
n-grams, length. A classifier of reviews is pleased by "wonderful" and "10/10"
whatever they praise: perplexity and distinct tell.
"""

import random
from collections.abc import Callable

from jaxrl_tok import Task, main
from jaxrl_tok.data import open_records

CLASSIFIER = 'lvwerra/distilbert-imdb'
POSITIVE = 1  # number of the classifier's label


def opening(review: str) -> str:
  """First half of a review, by words."""
  words = review.replace('<br />', '\n').split(' ')
  return ' '.join(words[: max(1, len(words) // 2)])


def classifier(name: str) -> Callable:
  """Reward: probability of a positive text, 0 to 1, by a classifier of
  transformers, which reads the prompt and the completion. Needs torch."""
  try:
    import torch  # noqa: F401
    from transformers import pipeline
  except ImportError:
    raise ValueError(
      f'the classifier {name} runs on torch, which is not installed; run pip '
      'install torch, or pass --sentiment vader'
    ) from None
  try:
    judge = pipeline('text-classification', model=name, top_k=None)
  except (OSError, ValueError) as e:
    reason = ' '.join(str(e).split())
    raise ValueError(
      f'the classifier {name} cannot be loaded ({reason}); pass a directory, '
      'or --sentiment vader'
    ) from None
  label = judge.model.config.id2label[POSITIVE]

  def positive(prompts, completions) -> list[float]:
    texts = [p + c for p, c in zip(prompts, completions)]
    return [
      next(score['score'] for score in scores if score['label'] == label)
      for scores in judge(texts, truncation=True, batch_size=32)
    ]

  return positive


def imdb(
  data: str = 'hub:stanfordnlp/imdb@main:train',
  sentiment: str = CLASSIFIER,
  held_out: int | None = None,
) -> Task:
  """Movie reviews to be continued positively.

  Args:
    data: Reviews, in a column text: a jsonl or parquet file, or
      hub:OWNER/NAME@REVISION:SPLIT.
    sentiment: Reward: a classifier (hub id or directory), or vader.
  """
  from jaxrl_tok import rewards

  judge = rewards.sentiment() if sentiment == 'vader' else classifier(sentiment)
  records = open_records(data, columns={'text': 'prompt'})
  reviews = [r['prompt'] for r in records]
  random.Random(0).shuffle(reviews)  # the hub has all negative ones first
  return Task(
    [{'prompt': opening(review)} for review in reviews],
    judge,
    held_out=held_out or 512,
    metrics=(rewards.perplexity, rewards.distinct),
    greedy=False,
    description=f'openings of movie reviews from {data}',
  )


def run(argv=None):
  return main(
    imdb,
    argv,
    model='openai-community/gpt2',
    algorithm='ppo',
    kl='reward',
    beta=0.1,
    learning_rate=1e-6,
    epochs=5,
    mini_batches=27,
    max_steps=50,
    num_prompts=27,
    num_generations=1,
    max_prompt_length=64,
    long_prompts='cut_left',
    max_completion_length=48,
    length_buckets=1,
    eval_every=10,
    save_every=0,
  )


if __name__ == '__main__':
  run()
