"""Stop texts: a row ends with the token that first makes `stop in text` true,
for every kind of tokenizer, in the sampler as in the host's definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import changed, look, make_rollout
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from jaxrl_tok import Task, data, distribution, train
from jaxrl_tok.data import stops
from jaxrl_tok.data.words import LOST, token_words
from jaxrl_tok.run import flags
from jaxrl_tok.sampler import make_sampler
from jaxrl_tok.types import Prompts

EOS, V = 10, 11  # <pad> is 0, as conftest's policy has it
TEXT = [
  'the cat. Question: is é a b?\n\nAnswer: ab abab aab 你好 😀 ',
  'a  b\n\n\n',
]


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
  tokenizer.add_special_tokens(['<pad>', '<eos>'])
  return PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, eos_token='<eos>', pad_token='<pad>'
  )


def vocabulary(tokens) -> dict:
  return {token: i for i, token in enumerate(['<pad>', *tokens, '<eos>'])}


def plain_bpe(tokens, decoder, **more):
  tokenizer = Tokenizer(models.BPE(vocabulary(tokens), [], **more))
  tokenizer.decoder = decoder
  return wrap(tokenizer)


def sentencepiece_decoder(strip: bool):
  parts = [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]
  return decoders.Sequence(parts + [decoders.Strip(' ', 1, 0)] * strip)


def byte_level(tokens):
  return plain_bpe(tokens, decoders.ByteLevel())


def llama(tokens):
  return plain_bpe(tokens, sentencepiece_decoder(True))


def gemma(tokens):
  return plain_bpe(tokens, sentencepiece_decoder(False))


def metaspace(tokens):
  return plain_bpe(tokens, decoders.Metaspace())


def suffixes(tokens):
  return plain_bpe(
    tokens, decoders.BPEDecoder('</w>'), end_of_word_suffix='</w>'
  )


def word_piece(tokens):
  tokenizer = Tokenizer(models.WordPiece(vocabulary(tokens), unk_token='<pad>'))
  tokenizer.decoder = decoders.WordPiece()
  return wrap(tokenizer)


def words(tokens):
  model = models.WordLevel(vocabulary(tokens), unk_token='<pad>')
  return wrap(Tokenizer(model))


# parts of tokens: bytes of é, €, 😀 and of newlines among them
LETTERS = 'a', 'b', 'ab', 'ba', 'aa'
BYTES = tuple(f'<0x{b:02X}>' for b in b'a\n \xc3\xa9\xe2\x82\xac\xff')
PIECES = {
  byte_level: (
    *LETTERS,
    'Ġ',
    'Ċ',
    'Ã',
    '©',
    'âĤ',
    '¬',
    'ðŁĺ',
    'Ģ',
    'Ã©',
    'ĠĠa',
  ),
  llama: (*LETTERS, '▁', '▁a', '▁▁', 'b▁', 'é', *BYTES),
  gemma: (*LETTERS, '▁', '▁a', '▁▁', 'b▁', 'é', *BYTES),
  metaspace: (*LETTERS, '▁', '▁a', '▁▁b', 'b▁', 'é', '.'),
  suffixes: (*LETTERS, 'a</w>', 'b</w>', 'ab</w>', '</w>', 'é</w>'),
  word_piece: (*LETTERS, '##a', '##b', '##ab', '.', ',', "'", 's', '##é', 'é'),
  words: (*LETTERS, 'é', '.', ' ', ' b', 'a b'),
}
RARE = st.text('ab é€😀\n.', min_size=1, max_size=4)


def some(pool, data):
  """Nine different tokens of a pool."""
  return data.draw(
    st.lists(st.sampled_from(pool), min_size=9, max_size=9, unique=True)
  )


def texts_in(data, tokenizer, rows) -> list[str]:
  """Stop texts: some that the rows hold, and one that they may hold."""
  found = [data.draw(RARE)]
  for row in rows:
    shown = tokenizer.backend_tokenizer.decode(row)
    start = data.draw(st.integers(0, max(len(shown) - 1, 0)))
    cut = shown[start : start + data.draw(st.integers(1, 4))]
    found += [cut] * (cut != '' and LOST not in cut)
  return found


def ends_at(tokenizer, texts, ids, skip=True) -> int | None:
  """Number of tokens up to the one that completes a stop text: the host's
  definition."""
  for n in range(1, len(ids) + 1):
    shown = tokenizer.backend_tokenizer.decode(
      ids[:n], skip_special_tokens=skip
    )
    if any(text in shown for text in texts):
      return n
  return None


def automaton(tokenizer, texts, vocab_size=V, skip=True):
  """Automaton of texts, some of which may be impossible to write."""
  decode = functools.partial(
    data.decode_all, tokenizer, skip_special_tokens=skip
  )
  known = token_words(tokenizer, decode, vocab_size, skip)
  found = stops.automaton(texts, known)
  stops.check_probes(tokenizer, decode, texts, known, *found)
  return found


@pytest.mark.parametrize('make', PIECES, ids=lambda make: make.__name__)
@settings(max_examples=40)
@given(st.data(), st.booleans())
def test_the_automaton_is_the_definition(make, data, skip):
  tokenizer = make(some(PIECES[make], data))
  ids = st.lists(st.integers(0, V - 1), max_size=10)
  rows = data.draw(st.lists(ids, min_size=1, max_size=8))
  texts = texts_in(data, tokenizer, rows[:2])
  kind, next_state = automaton(tokenizer, texts, V, skip)
  assert kind.shape == (V,)
  for row in rows:
    state, found = 0, None
    for n, token in enumerate(row):
      state = next_state[state, kind[token]]
      if state == len(next_state) - 1 and found is None:
        found = n + 1
    assert found == ends_at(tokenizer, texts, row, skip)


LEADS = st.sampled_from(
  b'\x00\x7f\x80\x8f\x90\x9f\xa0\xbf\xc0\xc2\xdf\xe0\xed\xf0\xf4'
)


@settings(max_examples=1000)
@given(st.lists(LEADS | st.integers(0, 255), max_size=8).map(bytes))
def test_runs_of_byte_tokens_are_shown_if_they_are_utf_8(run):
  state = ()
  for byte in run:
    state = stops.next_run(state, byte)
  try:
    run.decode()
    assert state == ()
  except UnicodeDecodeError as e:
    cut = e.reason == 'unexpected end of data'  # more bytes may mend it
    assert (state == stops.BROKEN) != cut
    assert state


def trained() -> PreTrainedTokenizerFast:
  """Byte-level BPE with merges, and added tokens that are no special ones."""
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.train_from_iterator(
    TEXT,
    BpeTrainer(
      vocab_size=330,
      show_progress=False,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ),
  )
  tokenizer.add_tokens(['<think>', 'é a'])
  return wrap(tokenizer)


def llama_like() -> PreTrainedTokenizerFast:
  """SentencePiece-like BPE with merges and byte fallback."""
  tokens = ['<unk>', *(f'<0x{b:02X}>' for b in range(256))]
  tokens += ['▁', 'a', 'b', '▁a', 'ab', '▁ab', 'é', '▁é', 'Q', ':', '▁Q']
  merges = [('▁', 'a'), ('a', 'b'), ('▁', 'ab'), ('▁', 'é'), ('▁', 'Q')]
  tokenizer = Tokenizer(
    models.BPE(
      {token: i for i, token in enumerate(tokens)},
      merges,
      unk_token='<unk>',
      byte_fallback=True,
    )
  )
  tokenizer.normalizer = normalizers.Sequence(
    [normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]
  )
  tokenizer.decoder = sentencepiece_decoder(True)
  return wrap(tokenizer)


@pytest.mark.parametrize('make', [trained, llama_like, data.byte_tokenizer])
@settings(max_examples=30)
@given(st.data())
def test_text_ends_where_its_tokens_complete_a_stop_text(make, data):
  """Texts as the tokenizer reads them, with random ids between."""
  tokenizer = make()
  texts = data.draw(
    st.lists(
      st.sampled_from(('\n\n', 'ab', 'Q:', 'é a', ' a', '\n', '好', 'b\nQ')),
      min_size=1,
      max_size=3,
    )
  )
  kind, next_state = stops.stop_automaton(tokenizer, texts, len(tokenizer) + 2)
  assert (kind[-2:] == kind[tokenizer.eos_token_id]).all()  # no token: no text
  row = []
  for _ in range(3):
    row += tokenizer.backend_tokenizer.encode(
      data.draw(st.text('abQ: é\n好😀', max_size=6)), add_special_tokens=False
    ).ids
    row += data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=2))
  states = stops.states_after(kind, next_state, row)
  complete = [n + 1 for n, s in enumerate(states) if s == len(next_state) - 1]
  assert next(iter(complete), None) == ends_at(tokenizer, texts, row)
  # a complete text stays so
  assert (
    complete == list(range(complete[0], len(row) + 1)) if complete else True
  )


def test_tokens_left_out_change_no_state_and_text_of_them_does():
  """'a<eos>b' is read as 'ab', or with its special tokens as it stands."""
  tokenizer = data.byte_tokenizer()
  a, b = tokenizer.convert_tokens_to_ids(['a', 'b'])
  row = [a, tokenizer.eos_token_id, b]
  for skip, end in ((True, 3), (False, None)):
    found = stops.stop_automaton(tokenizer, ('ab',), 258, skip)
    assert ends_at(tokenizer, ('ab',), row, skip) == end
    assert (stops.states_after(*found, row)[-1] == 3) == (end == 3)
  kept = stops.stop_automaton(tokenizer, ('a<eos>',), 258, False)
  assert stops.states_after(*kept, row)[1] == len(kept[1]) - 1


def test_a_large_vocabulary_has_few_kinds():
  """Number of kinds, and so memory, depends on the stop texts alone."""
  rng = np.random.default_rng(0)
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  lengths = rng.integers(2, 9, 20_000)
  made = (''.join(rng.choice(alphabet, n)) for n in lengths)
  vocab = {
    token: i for i, token in enumerate(dict.fromkeys([*alphabet, *made]))
  }
  tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.BPE(vocab, []))
  )
  tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
  kind, next_state = stops.stop_automaton(
    tokenizer, ('\n\n', 'Question:'), len(vocab)
  )
  assert next_state.shape[0] == 12  # 10 beginnings, the start and the end
  assert next_state.shape[1] < 50
  assert kind.dtype == next_state.dtype == np.int32


# --- refusals


@pytest.mark.parametrize(
  ('texts', 'line'),
  [
    (('',), "^--stop '' ends every completion at once"),
    ((r'\n\n',), r'holds a backslash and a letter .* \$'),
    ((r'Question:\n',), 'holds a backslash and a letter'),
    (('\udcff',), 'is no UTF-8 text'),
    (('a\ufffd',), 'is no UTF-8 text'),
    (('x<eos>',), 'holds the special token <eos>, .* --stop_token'),
  ],
)
def test_a_text_that_cannot_be_meant_is_refused(texts, line):
  with pytest.raises(ValueError, match=line) as fault:
    stops.stop_automaton(data.byte_tokenizer(), texts, 258)
  assert '\n' not in str(fault.value)


def test_latex_is_no_new_line():
  for text in (r'\nabla', r'\text{', r'\right'):
    assert stops.check_texts([text]) is None


def test_a_text_that_no_tokens_write_is_refused():
  tokenizer = word_piece([*'abcd', '##a', '##b', '.', ',', 's'])
  stops.stop_automaton(tokenizer, ('a b', 'ab'), V)
  with pytest.raises(ValueError, match=r"^--stop 'A' can never be complete"):
    stops.stop_automaton(tokenizer, ('a b', 'A'), V)


def test_a_tokenizer_whose_text_is_no_sum_is_refused():
  """CTC shows equal neighbours once."""
  tokenizer = words([*'abcdefghi'])
  tokenizer.backend_tokenizer.decoder = decoders.CTC('<pad>')
  with pytest.raises(
    ValueError, match=r'^--stop needs .*CTC.* leave --stop out'
  ):
    stops.stop_automaton(tokenizer, ('ab',), V)


def test_flags_of_stop_texts(capsys):
  def parse(*argv):
    return flags.parse(flags.Settings(), None, 'prog', list(argv)).settings

  found = parse('--stop', '\n\n', 'Question:').sampling.stop
  assert found == ('\n\n', 'Question:')
  assert parse('--stop=--').sampling.stop == ('--',)
  for argv, line in (
    (('--stop', r'\n'), 'holds a backslash'),
    (('--stop', 'a', '--stop', 'b'), 'write all its texts after one --stop'),
  ):
    with pytest.raises(SystemExit):
      parse(*argv)
    assert line in capsys.readouterr().err


@pytest.mark.parametrize(
  ('answer', 'texts', 'kept'),
  [
    ('42', ('\n',), '42<eos>'),
    ('42\n', ('\n',), '42\n'),  # where the sampler ends, too
    ('4\n2\n', ('2\n',), '4\n2\n'),
    ('42', (), '42<eos>'),
    ('4\n2', ('\n',), None),
    ('42\n\n', ('\n',), None),
  ],
)
def test_a_right_answer_ends_where_the_sampler_ends(answer, texts, kept):
  tokenizer = data.byte_tokenizer()
  decode = functools.partial(data.decode_all, tokenizer)
  ids = [*tokenizer(answer)['input_ids'], tokenizer.eos_token_id]
  if kept is None:
    with pytest.raises(ValueError, match=r'^the answer .* leave that text out'):
      data.end_at_stop(decode, ids, texts)
  else:
    found = data.end_at_stop(decode, ids, texts)
    assert tokenizer.decode(found) == kept


# --- the sampler

STATES, KINDS = 48, 12  # of all automata here: one program samples by them all


def padded(kind, next_state):
  """An automaton padded with states and kinds that nothing reaches."""
  last = len(next_state) - 1
  assert last < STATES
  assert next_state.shape[1] <= KINDS
  table = np.full((STATES, KINDS), STATES - 1)
  moved = np.where(next_state == last, STATES - 1, next_state)
  table[:last, : next_state.shape[1]] = moved[:last]
  return kind, table


@pytest.fixture(scope='module')
def samplers(tiny):
  """Samplers with a stop text: by stages, with moving rows, and greedy."""
  configs = {
    'stages': changed(tiny.config, chunk=2, stages=3),
    'compact': changed(tiny.config, chunk=1, compact_levels=2, stages=2),
    'greedy': changed(tiny.config, greedy=True),
  }
  return {
    name: jax.jit(make_sampler(tiny.policy, config))
    for name, config in configs.items()
  }


@pytest.fixture(scope='module')
def greedy(tiny):
  return jax.jit(make_sampler(tiny.policy, changed(tiny.config, greedy=True)))


def check_stopped(whole, found, tokenizer, texts, ends=(EOS,)) -> int:
  """Checks that `found` is `whole` up to each row's end by the host's
  definition. Returns the number of rows that a stop text ended."""
  stopped, T = 0, whole.tokens.shape[1]
  for b, row in enumerate(np.asarray(whole.tokens).tolist()):
    chosen = [x for x, on in zip(row, np.asarray(whole.mask)[b]) if on]
    by_text = ends_at(tokenizer, texts, chosen) or T + 1
    by_token = min(
      (row.index(e) + 1 for e in ends if e in chosen), default=T + 1
    )
    n = min(by_text, by_token)
    length = min(n, T)
    assert np.asarray(found.mask[b]).tolist() == [t < length for t in range(T)]
    assert found.tokens[b, :length].tolist() == row[:length]
    assert (np.asarray(found.tokens[b, length:]) == 0).all()
    assert bool(found.ended[b]) == (n <= T)
    np.testing.assert_allclose(
      found.logp[b, :length], whole.logp[b, :length], atol=1e-5
    )
    assert (np.asarray(found.logp[b, length:]) == 0).all()
    stopped += by_text < by_token
  return stopped


@pytest.mark.parametrize('how', ['stages', 'compact', 'greedy'])
def test_rows_end_by_the_token_that_completes_a_text(
  tiny, samplers, greedy, how
):
  stopped = []

  @settings(max_examples=30)
  @given(st.data(), st.integers(0, 2**20))
  def law(data, seed):
    make = data.draw(st.sampled_from(list(PIECES)))
    tokenizer = make(some(PIECES[make], data))
    args = tiny.params, jax.random.key(seed), tiny.prompts
    plain = greedy if how == 'greedy' else tiny.sample
    whole = plain(*args, distribution.make_rule(V, [EOS, EOS]))
    texts = texts_in(data, tokenizer, np.asarray(whole.tokens)[3:5].tolist())
    found = automaton(tokenizer, texts)
    assume(len(found[1]) < STATES and found[1].shape[1] <= KINDS)
    rule = distribution.make_rule(V, [EOS], stop=padded(*found))
    rollout = samplers[how](*args, rule)
    stopped.append(check_stopped(whole, rollout, tokenizer, texts))

  law()
  assert sum(n > 0 for n in stopped) > len(stopped) // 2


def test_evaluate_gives_the_log_probs_of_stopped_rows(tiny, samplers):
  tokenizer = byte_level([*'ab', 'ab', 'ba', 'aa', 'Ġ', 'Ċ', 'Ã', '©'])
  texts = ('ab', 'é', '\n')
  rule = distribution.make_rule(
    V, [EOS], stop=padded(*automaton(tokenizer, texts))
  )
  stopped = 0
  for seed in range(3):
    args = tiny.params, jax.random.key(seed), tiny.prompts
    whole = tiny.sample(*args, distribution.make_rule(V, [EOS, EOS]))
    rollout = samplers['compact'](*args, rule)
    stopped += check_stopped(whole, rollout, tokenizer, texts)
    stats = look(tiny.policy, tiny.params, rollout, rule)
    np.testing.assert_allclose(rollout.logp, stats.logp, atol=1e-5)
  assert stopped > 5


def test_stopped_sequences_are_all_of_them(tiny):
  """Sum of probabilities over every stopped sequence is 1, so that its gradient
  is 0: a stopping time leaves no mass out and counts none twice."""
  tokenizer = byte_level([*'ab', 'ab', 'ba', 'aa', 'Ġ', 'Ċ', 'Ã', '©'])
  T, leaves, open_rows = 3, [], [()]
  while open_rows:
    row = [*open_rows.pop()]
    over = len(row) == T or (row and row[-1] == EOS)
    if over or ends_at(tokenizer, ('ab', 'é'), row):
      leaves.append(row)
    else:
      open_rows += [(*row, token) for token in range(V)]
  n = len(leaves)
  assert 200 < n < V**3 - 100
  tokens = np.array([row + [0] * (T - len(row)) for row in leaves], np.int32)
  mask = np.array([[t < len(row) for t in range(T)] for row in leaves])
  prompts = Prompts(tiny.prompts.tokens[2:3], tiny.prompts.length[2:3])
  rollout = make_rollout(prompts, tokens, mask)
  rule = distribution.make_rule(V, [EOS])

  @jax.jit
  @jax.value_and_grad
  def total(params):
    stats = look(tiny.policy, params, rollout, rule)
    return jnp.sum(jnp.exp(stats.logp.sum(1)))

  value, grad = total(tiny.params)
  assert float(value) == pytest.approx(1, abs=1e-5)
  largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grad))
  assert largest < 1e-5


def test_without_stop_texts_the_program_is_as_if_there_were_none(tiny):
  """Operations of the automaton are in the program only with a stop text."""
  sample = make_sampler(tiny.policy, tiny.config)
  args = tiny.params, jax.random.key(0), tiny.prompts
  without = str(jax.make_jaxpr(sample)(*args, tiny.rule))
  tokenizer = byte_level([*'ab', 'ab', 'ba', 'aa', 'Ġ', 'Ċ', 'Ã', '©'])
  rule = tiny.rule._replace(
    stop=distribution.make_rule(V, [], stop=automaton(tokenizer, 'a')).stop
  )
  with_stop = str(jax.make_jaxpr(sample)(*args, rule))
  # one for column 0, one for each of the others: kind, then next state
  assert with_stop.count(' gather[') == without.count(' gather[') + 4


def test_a_run_and_generate_end_by_a_text(tmp_path, monkeypatch):
  """Rewards get the text with the stop text at its end, as the policy wrote
  it; generate() ends there, too."""
  devices = jax.local_devices()[:1]
  monkeypatch.setattr(jax, 'devices', lambda *args: devices)
  seen, texts = [], tuple('abcdefgh0123456789 .,:;!?ABCDEFGH\n')

  def short(completions, completion_ids, **columns):
    seen.extend(zip(completions, completion_ids))
    return [-float(len(ids)) for ids in completion_ids]

  result = train(
    Task([{'prompt': f'{i}:'} for i in range(12)], short, held_out=4),
    stop=texts,
    output_dir=str(tmp_path / 'run'),
    num_prompts=2,
    num_generations=4,
    max_steps=1,
    eval_every=0,
    d_model=16,
    num_layers=1,
    d_ff=16,
    max_completion_length=8,
    length_buckets=1,
    log_kl=False,
    report_to='none',
  )
  shown = [text for text, _ in seen]
  shown += result.generate(['1:', '22:', '333:'], greedy=False)
  by_text = 0
  for text in shown:
    assert not any(stop in text[:-1] for stop in texts)
    by_text += text.endswith(texts)
  assert by_text > len(shown) // 4
  assert {len(ids) for _, ids in seen} > {1, 8}  # and some run to T
